"""Qwen3-MoE on the hub."""

from collections.abc import Mapping

from portmoe.families import hub
from portmoe.families.architecture import Layer
from portmoe.families.qwen_hf import ABSENT, FIXED


def layer(sizes: Layer, at: str) -> Mapping[str, hub.Made]:
    """The parameters of one layer."""
    return hub.grouped_attention(sizes.attention, at) | hub.network(sizes, at)


HUB = hub.Hub(
    architecture="Qwen3MoeForCausalLM",
    layer=layer,
    absent={**ABSENT, "head_dim": None, "attention_bias": False},
    renamed={"num_local_experts": "num_experts"},
    fixed={
        **FIXED,
        # what some of its folders say of other families' options
        "qkv_bias": lambda value, _: not value,
        "shared_expert_intermediate_size": lambda value, _: not value,
        "use_qk_norm": lambda value, _: value is True,
    },
    free=hub.FREE,
)
