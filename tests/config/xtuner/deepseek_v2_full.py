# Full fine-tuning of the 236B chat model, three epochs, as a user of XTuner writes it.
import torch
from datasets import load_dataset
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR
from torch.optim import AdamW
from transformers import AutoTokenizer
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import alpaca_map_fn, template_map_fn_factory
from xtuner.engine.hooks import (
    DatasetInfoHook,
    EvaluateChatHook,
    ThroughputHook,
    VarlenAttnArgsToMessageHubHook,
)
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune
from xtuner.model.transformers_models.deepseek_v2 import DeepseekV2ForCausalLM
from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE

weights = "deepseek-ai/DeepSeek-V2-Chat"
use_varlen_attn = False
template = PROMPT_TEMPLATE.deepseek_v2
length = 2048
pack = True
sequence_parallel_size = 1
batch_size = 1
accumulative_counts = 1
accumulative_counts *= sequence_parallel_size
max_epochs = 3
optim_type = AdamW
lr = 1e-5
warmup_ratio = 0.03
save_steps = 50
evaluation_freq = 25
SYSTEM = SYSTEM_TEMPLATE.alpaca
questions = ["Name five sights of Shanghai.", "What is 17 times 23?"]

tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=weights,
    trust_remote_code=True,
    padding_side="right",
)
model = dict(
    type=SupervisedFinetune,
    use_varlen_attn=use_varlen_attn,
    llm=dict(
        type=DeepseekV2ForCausalLM.from_pretrained,
        moe_implementation="shard",
        expert_in_one_shard=20,
        pretrained_model_name_or_path=weights,
        attn_implementation="flash_attention_2",
        torch_dtype=torch.float16,
        trust_remote_code=True,
    ),
)

alpaca = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path="tatsu-lab/alpaca"),
    tokenizer=tokenizer,
    max_length=length,
    dataset_map_fn=alpaca_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=template),
    remove_unused_columns=True,
    shuffle_before_pack=True,
    pack_to_max_length=pack,
    use_varlen_attn=use_varlen_attn,
)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=4,
    dataset=alpaca,
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn, use_varlen_attn=use_varlen_attn),
)

optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=optim_type, lr=lr, betas=(0.9, 0.999), weight_decay=0),
    clip_grad=dict(max_norm=1, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts,
    loss_scale="dynamic",
    dtype="float16",
)
param_scheduler = dict(
    type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, end=max_epochs, convert_to_iter_based=True
)
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)

custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(
        type=EvaluateChatHook,
        tokenizer=tokenizer,
        every_n_iters=evaluation_freq,
        evaluation_inputs=questions,
        system=SYSTEM,
        prompt_template=template,
    ),
    dict(type=ThroughputHook),
]
if use_varlen_attn:
    custom_hooks += [dict(type=VarlenAttnArgsToMessageHubHook)]
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(
        type=CheckpointHook, by_epoch=False, interval=save_steps, max_keep_ckpts=2, save_optimizer=False
    ),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork"), dist_cfg=dict(backend="nccl"))
visualizer = None
log_level = "INFO"
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
log_processor = dict(by_epoch=False)
