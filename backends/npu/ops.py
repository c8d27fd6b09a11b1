"""The implementations Ascend NPUs offer beside the references. Run on a simulated device only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from portmoe.accelerator import Operations
from portmoe.accelerator.probing import describe
from portmoe.backends.npu import fused, grouped_matmul
from portmoe.ops import torch_native
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload

# torch_npu has no plain grouped_mm, and torch's fused AdamW has no kernel for it.
LACKING = (torch_native.EXPERT_FFN_GROUPED_MM, torch_native.ADAMW_FUSED)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST_HEAD = 512
MOST_HEADS = 256
WIDEST_ROTATED_HEAD = 896
MOST_CHOICES = 512
LARGEST_INDEX = 16_777_215  # rows that npu_moe_token_permute can sort

REARRANGE = "moe.enable_token_rearrange_opt"

Reason = str | None


class NpuOperations(Operations):
    """The plug-in's fused functions, then torch's own fast paths."""

    def implementations(self) -> Sequence[Implementation]:
        return [*FUSED, GATING, *(i for i in torch_native.ALL if i not in LACKING)]


def _attention_supports(workload: Workload) -> Reason:
    if workload.head_dim > WIDEST_HEAD:
        return f"the head dimension is {workload.head_dim}, over {WIDEST_HEAD}"
    if workload.heads > MOST_HEADS:
        return f"there are {workload.heads} heads, over {MOST_HEADS}"
    return None


def _rotary_supports(workload: Workload) -> Reason:
    if workload.head_dim > WIDEST_ROTATED_HEAD:
        return f"the head dimension is {workload.head_dim}, over {WIDEST_ROTATED_HEAD}"
    return None


def _permutation_supports(workload: Workload) -> Reason:
    if workload.capacity:
        return (
            "it permutes all choices, and a static buffer drops some and leaves rows empty; "
            "it serves dropless layers (moe_type MegaBlock-D)"
        )
    if workload.top_k > MOST_CHOICES or workload.tokens * workload.top_k >= LARGEST_INDEX:
        return f"{workload.tokens} tokens with {workload.top_k} choices each are over what it can sort"
    return None


def _grouped_supports(workload: Workload) -> Reason:
    if workload.experts > grouped_matmul.MOST_GROUPS:
        return f"there are {workload.experts} experts, over {grouped_matmul.MOST_GROUPS}"
    return None


def _always(workload: Workload) -> Reason:
    return None


def _fused(
    op: str,
    name: str,
    function: Callable[..., Any],
    supports: Callable[[Workload], Reason] = _always,
    requested_by: str | None = None,
) -> Implementation:
    """An implementation by the vendor's function ``name``."""

    def why_not(workload: Workload) -> Reason:
        if workload.dtype not in DTYPES:
            return f"{name} has no {workload.dtype}"
        return _missing(name) or supports(workload)

    return Implementation(op, name, function, why_not, requested_by)


def _missing(name: str) -> Reason:
    try:
        import torch_npu
    except Exception as error:
        return f"torch_npu does not load: {describe(error)}"
    return None if hasattr(torch_npu, name) else f"torch_npu {torch_npu.__version__} has no {name}"


NO_GRADIENTS = "npu_moe_gating_top_k_softmax is for inference: it has no gradients"


def _no_gradients(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(NO_GRADIENTS)


# Never taken; offered so that every record says why moe.use_fused_gating finds nothing here.
GATING = Implementation(
    "topk_gating",
    "npu_moe_gating_top_k_softmax",
    _no_gradients,
    lambda workload: NO_GRADIENTS,
    "moe.use_fused_gating",
)

FUSED = (
    _fused("rms_norm", "npu_rms_norm", fused.rms_norm),
    _fused("rotary", "npu_rotary_mul", fused.rotary, _rotary_supports),
    _fused("swiglu", "npu_swiglu", fused.swiglu),
    _fused("attention", "npu_fusion_attention", fused.attention, _attention_supports, "model.use_flash_attn"),
    _fused("dispatch", "npu_moe_token_permute", fused.dispatch, _permutation_supports, REARRANGE),
    _fused("combine", "npu_moe_token_unpermute", fused.combine, _permutation_supports, REARRANGE),
    _fused("expert_ffn", "npu_grouped_matmul", grouped_matmul.expert_ffn, _grouped_supports),
    _fused("expert_ffn_ragged", "npu_grouped_matmul", grouped_matmul.expert_ffn_ragged, _grouped_supports),
    _fused("adamw", "npu_apply_adam_w", fused.adamw),
)
