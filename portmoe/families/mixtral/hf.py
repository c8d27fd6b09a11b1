"""Mixtral on the hub."""

from collections.abc import Mapping
from typing import Any

from portmoe.families import hub
from portmoe.families.architecture import Layer

EXPERT = {"w1": "w1", "w3": "w3", "w2": "w2"}


def layer(sizes: Layer, at: str) -> Mapping[str, hub.Made]:
    """The parameters of one layer."""
    experts = hub.experts(sizes.network.count, f"{at}.block_sparse_moe", EXPERT)
    return hub.grouped_attention(sizes.attention, at) | experts


def _reaches_everything(window: Any, config: Mapping[str, Any]) -> bool:
    return window is None or window >= config.get("max_position_embeddings", 0)


HUB = hub.Hub(
    architecture="MixtralForCausalLM",
    layer=layer,
    absent={**hub.ABSENT, "head_dim": None, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0},
    fixed={"sliding_window": _reaches_everything},
    free=hub.FREE | {"router_jitter_noise"},
)
