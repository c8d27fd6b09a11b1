"""Moving tokens to the experts' rows and back: the permutation around the experts, by index."""

import math
from collections.abc import Iterator, Sequence

import torch

from portmoe.ops.megablock_gating import megablock_gating
from portmoe.ops.operation import Operation, Sample, draw, rounding
from portmoe.ops.topk_gating import topk_gating
from portmoe.ops.workload import Workload


def dispatch(x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    """Copy token s to row ``row_KS[k, s]`` of a buffer, for every choice k.

    Args:
        x_SH: [S, H].
        row_KS: [K, S] int64, distinct where below ``rows``; ≥ ``rows`` means the choice is dropped.
        rows: R, rows of the buffer; 0 is allowed.

    Returns:
        [R, H] in x's dtype; rows no token goes to are zero. The gradient of a token is the sum over
        its rows.
    """
    # One row more takes the dropped choices and is cut off; nothing reads it.
    buffer_RH = x_SH.new_zeros(rows + 1, x_SH.shape[1])
    copies_KSH = x_SH.expand(row_KS.shape[0], *x_SH.shape)
    return buffer_RH.index_copy(0, row_KS.clamp(max=rows).flatten(), copies_KSH.flatten(0, 1))[:rows]


def combine(y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
    """Σ_k weight[k, s] · y[row[k, s]] for every token s.

    Args:
        y_RH: [R, H]; R = 0 is allowed. Rows that no choice points to may hold anything, NaN included.
        row_KS: [K, S] int64, distinct where below R; ≥ R contributes nothing, whatever its weight.
        weight_KS: [K, S] float32.

    Returns:
        [S, H] in y's dtype, summed in float32 and rounded once; 0 for a token without a kept choice.
        Differentiable in y and weight; rows no choice points to get a zero gradient.
    """
    rows = y_RH.shape[0]
    wide = torch.promote_types(y_RH.dtype, torch.float32)
    padded_RH = torch.cat([y_RH, y_RH.new_zeros(1, y_RH.shape[1])])  # the dropped choices' row
    out_SH = y_RH.new_zeros(row_KS.shape[1], y_RH.shape[1], dtype=wide)
    for row_S, weight_S in zip(row_KS.clamp(max=rows), weight_KS.to(wide), strict=True):
        out_SH = out_SH + weight_S.unsqueeze(1) * padded_RH.index_select(0, row_S).to(wide)
    return out_SH.to(y_RH.dtype)


def _rows(workload: Workload, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Labels, rows of the choices and of the buffer: static, or ragged where the workload is dropless."""
    k = min(workload.top_k, workload.experts)
    shape = (workload.tokens, workload.experts)
    if workload.capacity:
        capacities = {
            "some dropped": workload.capacity,
            "empty rows": 2 * workload.capacity,
            "all dropped": 0,
        }
        for label, capacity in capacities.items():
            routing = topk_gating(torch.randn(shape, generator=generator), k, 0.0, capacity)
            yield label, routing.static_row_KS.to(workload.device), routing.static_rows
    else:
        for label, bias in (("uneven", 0.0), ("nearly all to one expert", 10.0)):
            logits_SE = torch.randn(shape, generator=generator)
            logits_SE[:, 0] += bias
            routing = megablock_gating(logits_SE, k, 1.0, drop_tokens=True, dropless=True)
            yield label, routing.ragged_row_KS.to(workload.device), routing.ragged_rows


def dispatch_samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    shape = (workload.tokens, workload.hidden)
    return [
        Sample(label, (draw(shape, workload, generator), row_KS, rows))
        for label, row_KS, rows in _rows(workload, generator)
    ]


def combine_samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    made = []
    for label, row_KS, rows in _rows(workload, generator):
        y_RH = draw((rows, workload.hidden), workload, generator)
        weight_KS = draw(row_KS.shape, workload, generator, dtype=torch.float32)
        made.append(Sample(label, (y_RH, row_KS, weight_KS)))
        if label == "empty rows":
            made.append(Sample("NaN in empty rows", (_without_unread(y_RH, row_KS), row_KS, weight_KS)))
    return made


def _without_unread(y_RH: torch.Tensor, row_KS: torch.Tensor) -> torch.Tensor:
    """A copy with NaN in the rows that no choice points to."""
    unread_R = torch.ones(len(y_RH) + 1, dtype=torch.bool, device=y_RH.device)
    unread_R[row_KS.flatten()] = False
    return y_RH.detach().masked_fill(unread_R[:-1, None], math.nan).requires_grad_()


# dispatch copies; its gradient adds k rounded terms. combine's weight gradient sums over H in float32.
DISPATCH = Operation("dispatch", dispatch, dispatch_samples, rounding(4))
COMBINE = Operation("combine", combine, combine_samples, rounding(4, sums=4))
