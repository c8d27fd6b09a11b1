"""DeepSeek-V2 on the hub. Pairs that turn together lie beside each other there as here."""

from collections.abc import Mapping
from typing import Any

from portmoe.families import hub
from portmoe.families.architecture import Layer

ATTENTION = {
    "q": "q_proj",
    "q_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "q_up": "q_b_proj",
    "down": "kv_a_proj_with_mqa",
    "latent_norm": "kv_a_layernorm",
    "up": "kv_b_proj",
    "out": "o_proj",
}


def layer(sizes: Layer, at: str) -> Mapping[str, hub.Made]:
    """The parameters of one layer."""
    left_out = {"q"} if sizes.attention.query_rank is not None else {"q_down", "q_norm", "q_up"}
    attention = {
        f"attention.{ours}.weight": hub.Same(f"{at}.self_attn.{theirs}.weight")
        for ours, theirs in ATTENTION.items()
        if ours not in left_out
    }
    return attention | hub.network(sizes, at, shared="shared_experts")


def _derived(*parts: str) -> hub.Allowed:
    """A width that follows from others."""

    def allowed(value: Any, config: Mapping[str, Any]) -> bool:
        return value is None or value == sum(config.get(part, 0) for part in parts)

    return allowed


HUB = hub.Hub(
    architecture="DeepseekV2ForCausalLM",
    layer=layer,
    absent={
        **hub.ABSENT,
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "moe_layer_freq": 1,
        "n_group": None,
        "norm_topk_prob": False,
        "num_key_value_heads": None,
        "scoring_func": "softmax",
        "seq_aux": True,
        "topk_group": None,
        "topk_method": "greedy",
    },
    fixed={
        "head_dim": _derived("qk_rope_head_dim"),
        "qk_head_dim": _derived("qk_nope_head_dim", "qk_rope_head_dim"),
    },
    free=hub.FREE | {"aux_loss_alpha", "seq_aux"},
)
