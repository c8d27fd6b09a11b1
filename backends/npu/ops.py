"""The implementations Ascend NPUs offer beside the references. Run on a simulated device only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from portmoe.accelerator import Operations
from portmoe.backends.npu import attention, cross_entropy, fused, grouped_matmul, limits, permutation
from portmoe.backends.npu.product import excluded
from portmoe.backends.npu.signatures import missing
from portmoe.backends.torch import ops as torch_ops
from portmoe.ops.attention import GROUPED_HEADS, VALUE_WIDTH
from portmoe.ops.cross_entropy import CUT_VOCABULARY
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload

# torch_npu has no plain grouped_mm.
LACKING = (torch_ops.EXPERT_FFN_GROUPED_MM,)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLASH, REARRANGE, GATING = (
    "model.use_flash_attn",
    "moe.enable_token_rearrange_opt",
    "moe.use_fused_gating",
)


class NpuOperations(Operations):
    """The plug-in's fused functions, torch's own fast paths, then what is to be measured first."""

    def implementations(self) -> Sequence[Implementation]:
        return [*FUSED, *UNUSED, *(i for i in torch_ops.ALL if i not in LACKING), *LAST]


def _fused(
    op: str,
    name: str,
    function: Callable[..., Any],
    supports: Callable[[Workload], str | None] = limits.none,
    requested_by: str | None = None,
    with_: tuple[str, ...] = (),
    handles: tuple[str, ...] = (),
) -> Implementation:
    """An implementation by the vendor's function ``name``, which needs those ``with_`` it too."""

    def why_not(workload: Workload) -> str | None:
        if workload.dtype not in DTYPES:
            return f"{name} has no {workload.dtype}"
        for needed in (name, *with_):
            reason = missing(needed) or excluded(needed, workload.device)
            if reason:
                return reason
        return supports(workload)

    return Implementation(op, name, function, why_not, requested_by, handles)


def _attention(name: str, function: Callable[..., Any]) -> Implementation:
    """Without the logarithm of the sums: the registered backward takes no gradient of it."""
    return _fused("attention", name, function, limits.attention, FLASH, handles=(GROUPED_HEADS, VALUE_WIDTH))


def _unused(op: str, name: str, reason: str, requested_by: str | None = None) -> Implementation:
    """A function of the vendor's that is never taken, so that every record says why."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(reason)

    return Implementation(op, name, refuse, lambda workload: reason, requested_by)


ACCUMULATE = ("npu_grouped_matmul_add_",)

FUSED = (
    _fused("rms_norm", "npu_rms_norm", fused.rms_norm),
    _fused("rotary", "npu_rotary_mul", fused.rotary, limits.rotary),
    _fused("swiglu", "npu_swiglu", fused.swiglu),
    _attention("npu_fusion_attention", attention.fusion_attention),
    _attention("npu_fusion_attention_v2", attention.fusion_attention_v2),
    _fused("dispatch", "npu_moe_token_permute", permutation.dispatch, limits.permuted_types, REARRANGE),
    _fused("combine", "npu_moe_token_unpermute", permutation.combine, limits.weighted_types, REARRANGE),
    _fused("expert_ffn", "npu_grouped_matmul", grouped_matmul.expert_ffn, limits.grouped, with_=ACCUMULATE),
    _fused(
        "expert_ffn_ragged",
        "npu_grouped_matmul",
        grouped_matmul.expert_ffn_ragged,
        limits.grouped,
        with_=ACCUMULATE,
    ),
    _fused("adamw", "npu_apply_adam_w", fused.adamw),
)

UNUSED = (
    _unused(
        "topk_gating",
        "npu_moe_gating_top_k_softmax",
        "npu_moe_gating_top_k_softmax is for inference: it has no gradients",
        GATING,
    ),
    _unused(
        "topk_gating",
        "npu_moe_gating_top_k",
        "the gradient of npu_moe_gating_top_k is documented for sigmoid gates alone (norm_type 1), "
        "and this gate is a softmax",
        GATING,
    ),
    _unused(
        "dispatch",
        "npu_moe_token_permute_with_routing_map",
        "its page does not say which token a row that is left stands for: one that is routed to the expert "
        "would be counted twice on the way back; and with drop_and_pad rows are in the order of the tokens, "
        "where second choices come after first ones",
        REARRANGE,
    ),
    _unused(
        "combine",
        "npu_moe_token_unpermute_with_routing_map",
        "it reads the rows npu_moe_token_permute_with_routing_map leaves, which are in another order",
        REARRANGE,
    ),
)

# Never run on a device, and its page names no product: with ops.select: measure, or where "chunked" is off.
LAST = (
    _fused(
        "cross_entropy",
        "npu_fused_linear_online_max_sum",
        cross_entropy.cross_entropy,
        limits.cut_vocabulary,
        with_=("npu_fused_linear_cross_entropy_loss_with_max_sum_backward",),
        handles=(CUT_VOCABULARY,),
    ),
)
