"""Small models of every published family and variant, as another library makes them, with random weights."""

import math

import torch

SIZES = {"vocab_size": 448, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LATENT = {
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 7,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 128,
}
QWEN = {
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.05,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

# name → the library's config class, its keys, its rope
VARIANTS = {
    "mixtral": (
        "MixtralConfig",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.05,
        },
        PLAIN,
    ),
    "qwen2_moe": ("Qwen2MoeConfig", QWEN | {"shared_expert_intermediate_size": 32}, PLAIN),
    "qwen2_moe, normalised, a dense layer": (
        "Qwen2MoeConfig",
        QWEN | {"shared_expert_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 2},
        PLAIN,
    ),
    "qwen3_moe": ("Qwen3MoeConfig", QWEN | {"head_dim": 12, "norm_topk_prob": True}, PLAIN),
    "qwen3_moe, biases, yarn, a dense layer": (
        "Qwen3MoeConfig",
        QWEN
        | {"head_dim": 12, "attention_bias": True, "mlp_only_layers": [1], "max_position_embeddings": 64},
        {k: v for k, v in YARN.items() if "mscale" not in k},
    ),
    "deepseek_v2": ("DeepseekV2Config", LATENT, PLAIN),
    "deepseek_v2, latent queries, groups, yarn": (
        "DeepseekV2Config",
        LATENT
        | {
            "q_lora_rank": 12,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
        },
        YARN,
    ),
}


def their_model(variant):
    """The library's model in float32, with weights large enough that every part of it matters."""
    import transformers

    kind, keys, rope = VARIANTS[variant]
    config = getattr(transformers, kind)(**SIZES, **keys, rope_parameters=dict(rope))
    torch.manual_seed(sum(map(ord, variant)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = parameter.dim() > 1
            parameter.copy_(
                torch.randn(parameter.shape) * (1.0 / math.sqrt(parameter.shape[-1]) if matrix else 0.2)
            )
            if not matrix and "norm" in name:
                parameter.add_(1)
    return model


def in_our_layout(named, config):
    """Their parameters, or gradients, by our names; written apart from the families' own tables.

    Args:
        named: their name → tensor.
        config: theirs.
    """
    heads = getattr(config, "num_key_value_heads", None)
    found = {}

    def take(ours, theirs):
        if f"model.{theirs}" in named:
            found[ours] = named[f"model.{theirs}"]

    take("embedding.weight", "embed_tokens.weight")
    take("norm.weight", "norm.weight")
    found["head.weight"] = named["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        here, there = f"layers.{layer}.", f"layers.{layer}."
        take(f"{here}attention_norm.weight", f"{there}input_layernorm.weight")
        take(f"{here}feed_forward_norm.weight", f"{there}post_attention_layernorm.weight")
        attention, theirs = f"{here}attention.", f"{there}self_attn."
        for ours, name in (
            ("out.weight", "o_proj.weight"),
            ("out.bias", "o_proj.bias"),
            ("q_norm.weight", "q_norm.weight"),
            ("k_norm.weight", "k_norm.weight"),
            ("q_down.weight", "q_a_proj.weight"),
            ("q_norm.weight", "q_a_layernorm.weight"),
            ("q_up.weight", "q_b_proj.weight"),
            ("down.weight", "kv_a_proj_with_mqa.weight"),
            ("latent_norm.weight", "kv_a_layernorm.weight"),
            ("up.weight", "kv_b_proj.weight"),
        ):
            take(attention + ours, theirs + name)
        if f"model.{theirs}k_proj.weight" in named:
            for leaf in ("weight", "bias"):
                parts = [named.get(f"model.{theirs}{n}_proj.{leaf}") for n in "qkv"]
                if parts[0] is not None:
                    joined = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
                    found[f"{attention}qkv.{leaf}"] = torch.cat(joined, 1).flatten(0, 1)
        else:
            take(f"{attention}q.weight", f"{theirs}q_proj.weight")
        network = f"{there}mlp."
        for ours, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            take(f"{here}feed_forward.{ours}.weight", f"{network}{name}.weight")
            for shared in ("shared_experts", "shared_expert"):
                take(f"{here}moe.shared.{ours}.weight", f"{network}{shared}.{name}.weight")
        take(f"{here}moe.shared_gate.weight", f"{network}shared_expert_gate.weight")
        take(f"{here}moe.router.weight", f"{network}gate.weight")
        take(f"{here}moe.experts.w2", f"{network}experts.down_proj")
        both = named.get(f"model.{network}experts.gate_up_proj")
        if both is not None:
            found[f"{here}moe.experts.w1"], found[f"{here}moe.experts.w3"] = both.chunk(2, dim=1)
    return found
