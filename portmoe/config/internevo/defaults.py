"""What InternEvo takes for a key that its config does not give, where that is not what portmoe takes.

Source: InternEvo 0.4, internlm/initialize/launch.py (args_sanity_check) and the signatures of the functions
that take the sections as arguments: the models' builders, the learning rate's schedule, the GShard layer.
"""

from typing import Any

MODEL_TYPE = "INTERNLM"  # dense; a mixture of experts has to say so
DENSE = "a model of InternEvo's type INTERNLM, the default, is dense"

SHAPE = {
    "model.num_layers": 48,
    "model.hidden_size": 2048,
    "model.vocab_size": 50304,
    "model.num_attention_heads": 32,
    "model.mlp_ratio": 4.0,
    "model.num_experts": 1,
}
DEFAULTS: dict[str, Any] = {
    "JOB_NAME": "AnonymousJob",
    "data.min_length": 0,
    "ckpt.enable_save_ckpt": True,
    "ckpt.async_upload": False,
    "hybrid_zero_optimizer.clip_grad_norm": 0.0,
    "loss.moe_loss_coeff": 1.0,
    "lr_scheduler.warmup_ratio": 0.0,
    "lr_scheduler.eta_min": 0.0,
    "model.dtype": "torch.float16",
    "moe.top_k": 1,
    **SHAPE,
}
