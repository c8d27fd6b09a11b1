"""Qwen2-MoE on the hub."""

from collections.abc import Mapping

from portmoe.families import hub
from portmoe.families.architecture import Layer
from portmoe.families.qwen_hf import ABSENT, FIXED


def layer(sizes: Layer, at: str) -> Mapping[str, hub.Made]:
    """The parameters of one layer."""
    return hub.grouped_attention(sizes.attention, at) | hub.network(sizes, at, shared="shared_expert")


HUB = hub.Hub(
    architecture="Qwen2MoeForCausalLM",
    layer=layer,
    absent={**ABSENT, "qkv_bias": True},
    fixed=FIXED,
    free=hub.FREE,
)
