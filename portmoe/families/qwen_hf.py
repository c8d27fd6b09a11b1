"""What the two Qwen families share on the hub."""

from collections.abc import Mapping
from typing import Any

from portmoe.families import hub

ABSENT: Mapping[str, Any] = {
    **hub.ABSENT,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}


def _all_full(types: Any, _: Mapping[str, Any]) -> bool:
    return types is None or set(types) == {"full_attention"}


FIXED: Mapping[str, hub.Allowed] = {"layer_types": _all_full}
