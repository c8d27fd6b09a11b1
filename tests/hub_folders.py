"""Tiny models with random weights, saved by the library people load them with, as the hub has them."""

from pathlib import Path
from typing import Any

import torch

GROUPED: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MIXTRAL = GROUPED | {"intermediate_size": 24, "num_local_experts": 4}
QWEN = GROUPED | {
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
LATENT = GROUPED | {
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 21,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 32,
}

# name → (class, keys of its config)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral, free heads": ("Mixtral", MIXTRAL | {"head_dim": 12, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3Moe", QWEN | {"head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3, biases": ("Qwen3Moe", QWEN | {"head_dim": 8, "attention_bias": True}),
    "qwen2": ("Qwen2Moe", QWEN | {"shared_expert_intermediate_size": 20}),
    "deepseek": (
        "DeepseekV2",
        LATENT
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 4.0,
            "rope_parameters": YARN,
        },
    ),
    "deepseek, no query latent": ("DeepseekV2", LATENT | {"q_lora_rank": None, "n_shared_experts": 1}),
}


def model(variant: str) -> Any:
    """The library's model, every weight of it random: a norm's gain and a bias too."""
    import transformers

    kind, keys = VARIANTS[variant]
    config = getattr(transformers, f"{kind}Config")(**keys, attn_implementation="eager")
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(len(variant))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            gain = 1.0 if "norm" in name else 0.0
            parameter.copy_(gain + 0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def save(variant: str, folder: Path, dtype: torch.dtype = torch.float32, file_bytes: str = "40KB") -> Any:
    """Write the model to ``folder``, in several files; returns it."""
    made = model(variant).to(dtype)
    made.save_pretrained(folder, max_shard_size=file_bytes)
    (folder / "tokenizer.json").write_text('{"a": "tokenizer, carried over as it is"}')
    return made


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the library of the format."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
