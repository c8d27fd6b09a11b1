"""Tutel's kernels as implementations, asked for by moe.use_tutel. Untested: tests run a stand-in.

Tutel numbers the choices of each expert (``fast_cumsum_sub_one``) and moves rows (``fast_dispatcher``). Its
own routing, ``extract_critical``, is other mathematics and is not used.
"""

from typing import Any

import torch

from portmoe.accelerator.probing import describe
from portmoe.backends.torch import dispatch as gather
from portmoe.ops.gating import running_count
from portmoe.ops.operation import Implementation
from portmoe.ops.routing import Routing
from portmoe.ops.topk_gating import topk_gating_by
from portmoe.ops.workload import Workload

KEY = "moe.use_tutel"
LARGEST = 2**31 - 1  # its kernels count in int32


def topk_gating(logits_SE: torch.Tensor, *args: Any, **options: Any) -> Routing:
    """The reference with Tutel's running count."""
    return topk_gating_by(_running_count, logits_SE, *args, **options)


def _running_count(expert_A: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of ``running_count``."""
    from tutel.moe import fast_cumsum_sub_one

    if not expert_A.numel():
        return running_count(expert_A, experts)
    mask_AE = torch.zeros(expert_A.numel(), experts, dtype=torch.int32, device=expert_A.device)
    mask_AE.scatter_(1, expert_A[:, None], 1)
    slot_AE = fast_cumsum_sub_one(mask_AE)
    slot_A = slot_AE.gather(1, expert_A[:, None]).squeeze(1).to(torch.int64)
    return slot_A, mask_AE.sum(0, dtype=torch.int64)


def dispatch(x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    """The contract of ``dispatch``: every row is a place of one expert; gradients are rounded once."""
    if not (x_SH.numel() and rows):
        return gather.dispatch(x_SH, row_KS, rows)
    ones_KS = torch.ones(row_KS.shape, device=row_KS.device, dtype=torch.float32)
    buffer_RH = _dispatcher(row_KS, ones_KS, rows, x_SH.shape[1]).encode(_wide(x_SH))
    return buffer_RH.view(rows, x_SH.shape[1]).to(x_SH.dtype)


def combine(y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
    """The contract of ``combine``, in float32, so that the sum is rounded once."""
    if not (y_RH.numel() and row_KS.numel()):
        return gather.combine(y_RH, row_KS, weight_KS)
    dispatcher = _dispatcher(row_KS, weight_KS.contiguous(), *y_RH.shape)
    return dispatcher.decode(_wide(y_RH)).view(-1, y_RH.shape[1]).to(y_RH.dtype)


def _dispatcher(row_KS: torch.Tensor, weight_KS: torch.Tensor, rows: int, hidden: int) -> Any:
    """Tutel's dispatcher for one expert with a capacity of all rows; a row past it is dropped."""
    from tutel.moe import fast_dispatcher

    # Always float32: the dispatchers share compiled kernels whatever their dtype.
    dispatcher = fast_dispatcher(
        num_global_experts=1, capacity=rows, model_dim=hidden, dispatch_dtype=torch.float32
    )
    row_KS = row_KS.clamp(max=rows).to(torch.int32).contiguous()
    expert_S = torch.zeros_like(row_KS[0])
    dispatcher.update([expert_S] * len(row_KS), list(row_KS), list(weight_KS), capacity=rows)
    return dispatcher


def _wide(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.float32).contiguous()


def supports(workload: Workload) -> str | None:
    """None where Tutel loads with the functions used here, otherwise why not."""
    if workload.dtype == torch.float64:
        return "its kernels compute in float32"
    if workload.tokens * workload.top_k * max(workload.experts, workload.hidden) > LARGEST:
        return "its kernels count in int32, and the buffers are larger"
    try:
        from tutel import moe
    except Exception as error:
        return f"tutel does not load: {describe(error)}"
    lacking = [name for name in ("fast_cumsum_sub_one", "fast_dispatcher") if not hasattr(moe, name)]
    return f"tutel.moe has no {lacking[0]}" if lacking else None


GATING = Implementation("topk_gating", "tutel", topk_gating, supports, KEY)
DISPATCH = Implementation("dispatch", "tutel", dispatch, supports, KEY)
COMBINE = Implementation("combine", "tutel", combine, supports, KEY)
