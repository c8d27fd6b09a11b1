# Full fine-tuning of Mixtral 8x7B on conversations, with a warm-up, on top of a shared base.
from mmengine.config import read_base
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from torch.optim import AdamW
from transformers import AutoModelForCausalLM
from xtuner.dataset import ConcatDataset, process_hf_dataset
from xtuner.dataset.map_fns import oasst1_map_fn
from xtuner.engine.hooks import CheckpointHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune

with read_base():
    from .default_runtime import *  # noqa: F403

max_epochs = 4
warmup_ratio = 0.05
model = dict(
    type=SupervisedFinetune,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path="mistralai/Mixtral-8x7B-v0.1",
    ),
)
conversations = dict(
    type=process_hf_dataset, max_length=4096, dataset_map_fn=oasst1_map_fn, pack_to_max_length=True
)
train_dataloader = dict(batch_size=2, dataset=dict(type=ConcatDataset, datasets=[conversations]))
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=2e-5, betas=(0.9, 0.98), weight_decay=0.1),
    accumulative_counts=16,
    loss_scale=dict(init_scale=1024, growth_interval=500),
    dtype="bfloat16",
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0, end=warmup_ratio * max_epochs),
    dict(
        type=CosineAnnealingLR, eta_min=1e-6, by_epoch=True, begin=warmup_ratio * max_epochs, end=max_epochs
    ),
]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)
default_hooks = dict(checkpoint=dict(type=CheckpointHook, interval=100, max_keep_ckpts=-1))
randomness = dict(seed=7)
