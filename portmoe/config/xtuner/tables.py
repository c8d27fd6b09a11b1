"""What a key of XTuner is called here, and what its programs take for one that a config does not give.

Sources: XTuner 0.1.23 (configs, model/sft.py, engine/hooks), mmengine 0.10 (optim, hooks) and torch's AdamW.
"""

from typing import Any

# The last part of a published model's name → the packaged config that has its sizes.
PUBLISHED = {
    "deepseek-v2": "deepseek_v2",
    "deepseek-v2-chat": "deepseek_v2",
    "deepseek-v2-chat-0628": "deepseek_v2",
    "deepseek-v2-lite": "deepseek_v2_lite",
    "deepseek-v2-lite-chat": "deepseek_v2_lite",
    "mixtral-8x7b-v0.1": "mixtral_8x7b",
    "mixtral-8x7b-instruct-v0.1": "mixtral_8x7b",
    "mixtral-8x22b-instruct-v0.1": "mixtral_8x22b",
    "qwen1.5-moe-a2.7b": "qwen15_moe_a27b",
    "qwen1.5-moe-a2.7b-chat": "qwen15_moe_a27b",
    "qwen2-57b-a14b": "qwen2_57b_a14b",
    "qwen2-57b-a14b-instruct": "qwen2_57b_a14b",
    "qwen3-30b-a3b": "qwen3_30b_a3b",
    "qwen3-30b-a3b-base": "qwen3_30b_a3b",
}

SCHEDULES = ("LinearLR", "CosineAnnealingLR")  # a warm-up, then a cosine
KEYS = {
    "model.use_varlen_attn": "data.use_varlen_attn",
    "model.use_activation_checkpointing": "model.checkpoint",
    "model.llm.moe_implementation": "moe.moe_implementation",
    "model.llm.expert_in_one_shard": "moe.expert_in_one_shard",
    "train_dataloader.batch_size": "data.micro_bsz",
    "train_dataloader.dataset.max_length": "data.seq_len",
    "train_dataloader.dataset.pack_to_max_length": "data.packing",
    "train_dataloader.dataset.dataset.data_files": "data.train_folder",
    "train_dataloader.dataset.dataset.data_files.train": "data.train_folder",
    "train_dataloader.dataset.dataset_map_fn": "data.format",
    "train_dataloader.dataset.template_map_fn.template": "data.chat_template",
    "optim_wrapper.accumulative_counts": "data.micro_num",
    "sequence_parallel_size": "parallel.sequence.size",  # by which their files multiply the accumulation
    "optim_wrapper.dtype": "model.dtype",
    "optim_wrapper.clip_grad.max_norm": "hybrid_zero_optimizer.clip_grad_norm",
    "optim_wrapper.optimizer.lr": "adam.lr",
    "optim_wrapper.optimizer.eps": "adam.adam_eps",
    "optim_wrapper.optimizer.weight_decay": "adam.weight_decay",
    "optim_wrapper.loss_scale.init_scale": "grad_scaler.fp16.initial_scale",
    "optim_wrapper.loss_scale.growth_interval": "grad_scaler.fp16.growth_interval",
    "optim_wrapper.loss_scale.growth_factor": "grad_scaler.growth_factor",
    "optim_wrapper.loss_scale.backoff_factor": "grad_scaler.backoff_factor",
    "param_scheduler.CosineAnnealingLR.eta_min": "lr_scheduler.eta_min",
    "train_cfg.max_epochs": "data.num_epochs",
    "train_cfg.max_iters": "data.total_steps",
    "default_hooks.checkpoint.interval": "ckpt.checkpoint_every",
    "default_hooks.checkpoint.max_keep_ckpts": "ckpt.keep",
    "default_hooks.checkpoint.save_optimizer": "ckpt.save_optimizer",
    "custom_hooks.EvaluateChatHook.every_n_iters": "eval.every",
    "custom_hooks.EvaluateChatHook.evaluation_inputs": "eval.prompts",
    "randomness.seed": "run.seed",
    "randomness.deterministic": "cudnn_deterministic",
    "env_cfg.cudnn_benchmark": "cudnn_benchmark",
}
NAMES = {  # of functions, for keys whose value is one
    "data.format": {
        "alpaca_map_fn": "alpaca",
        "alpaca_zh_map_fn": "alpaca",
        "openai_map_fn": "messages",
        "pretrain_map_fn": "text",
        "sharegpt_map_fn": "sharegpt",
    },
    "data.chat_template": {
        "deepseek_v2": "deepseek_v2",
        "mixtral": "mixtral",
        "internlm2_chat": "internlm2",
        "qwen_chat": "chatml",
    },
}
# With lr_scheduler.warmup_ratio and the parallelism: what holds unless the file says otherwise.
DEFAULTS: dict[str, Any] = {
    "model.dtype": "float16",
    "model.checkpoint": True,
    "hybrid_zero_optimizer.clip_grad_norm": 0.0,
    "adam.lr": 1e-3,
    "adam.adam_beta1": 0.9,
    "adam.adam_beta2": 0.999,
    "adam.weight_decay": 0.01,
    "lr_scheduler.warmup_ratio": 0.0,
    "lr_scheduler.eta_min": 0.0,
    "ckpt.enable_save_ckpt": True,
    "data.packing": "none",
    "data.use_varlen_attn": False,
    "parallel.zero1.fsdp": True,
}

# What every run here does by itself, or what only says how theirs is put together.
SILENT = (
    *("tokenizer", "visualizer", "log_level", "log_processor", "env_cfg", "work_dir"),
    *(
        "default_hooks.timer",
        "default_hooks.logger",
        "default_hooks.param_scheduler",
        "default_hooks.sampler_seed",
    ),
    *("default_hooks.checkpoint.by_epoch", "custom_hooks.DatasetInfoHook", "custom_hooks.ThroughputHook"),
    *("custom_hooks.VarlenAttnArgsToMessageHubHook", "custom_hooks.EvaluateChatHook.tokenizer"),
    *("model.llm.trust_remote_code", "model.llm.attn_implementation", "model.llm.torch_dtype"),
    *("train_dataloader.sampler", "train_dataloader.collate_fn", "train_dataloader.num_workers"),
    *("train_dataloader.dataset.tokenizer", "train_dataloader.dataset.remove_unused_columns"),
    *("train_dataloader.dataset.use_varlen_attn", "train_dataloader.dataset.shuffle_before_pack"),
    *("optim_wrapper.clip_grad.error_if_nonfinite", "optim_wrapper.clip_grad.norm_type"),
)
OTHER_MODEL = ("model.lora", "model.llm.quantization_config", "model.llm.config")
WHY_NOT = {
    "model.lora": "all weights are trained here",
    "model.llm.quantization_config": "weights are trained as they are, not quantized",
    "param_scheduler.LinearLR.start_factor": "the warm-up begins at zero",
    "train_dataloader.dataset.dataset.path": "give the data by data.train_folder",
    "strategy": "parallel.zero1 shards; trainer.engine: deepspeed takes the buckets as trainer.deepspeed",
}
NO_SUCH_KEY = "portmoe has no such key"
