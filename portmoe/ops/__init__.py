"""The operations: one file each, and the table that chooses among their implementations.

``portmoe.ops.<operation>`` is the reference of each, a plain function. Models call the functions of
an ``OpTable`` instead, chosen once for the device and the run's shapes.
"""

from portmoe.ops.adamw import ADAMW, adamw
from portmoe.ops.attention import ATTENTION, Segments, attention
from portmoe.ops.cross_entropy import CROSS_ENTROPY, cross_entropy
from portmoe.ops.dispatch import COMBINE, DISPATCH, combine, dispatch
from portmoe.ops.expert_ffn import EXPERT_FFN, EXPERT_FFN_RAGGED, expert_ffn, expert_ffn_ragged
from portmoe.ops.linear import LINEAR, linear
from portmoe.ops.megablock_gating import MEGABLOCK_GATING, megablock_gating
from portmoe.ops.operation import Group, Implementation, Operation
from portmoe.ops.rms_norm import RMS_NORM, rms_norm
from portmoe.ops.rotary import ROTARY, rotary
from portmoe.ops.router import ROUTER, router
from portmoe.ops.routing import Routing
from portmoe.ops.softmax_gating import SOFTMAX_GATING, softmax_gating
from portmoe.ops.swiglu import SWIGLU, swiglu
from portmoe.ops.table import OpTable, choose
from portmoe.ops.topk_gating import TOPK_GATING, topk_gating
from portmoe.ops.workload import CallSites, Workload

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        RMS_NORM,
        LINEAR,
        ROTARY,
        SWIGLU,
        ATTENTION,
        ROUTER,
        TOPK_GATING,
        MEGABLOCK_GATING,
        SOFTMAX_GATING,
        DISPATCH,
        COMBINE,
        EXPERT_FFN,
        EXPERT_FFN_RAGGED,
        CROSS_ENTROPY,
        ADAMW,
    )
}

__all__ = [
    "OPERATIONS",
    "CallSites",
    "Group",
    "Implementation",
    "OpTable",
    "Operation",
    "Routing",
    "Segments",
    "Workload",
    "adamw",
    "attention",
    "choose",
    "combine",
    "cross_entropy",
    "dispatch",
    "expert_ffn",
    "expert_ffn_ragged",
    "linear",
    "megablock_gating",
    "rms_norm",
    "rotary",
    "router",
    "softmax_gating",
    "swiglu",
    "topk_gating",
]
