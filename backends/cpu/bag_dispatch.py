"""Dispatch and combine for the CPU, every pass a sum over bags of rows.

A buffer row is the sum over a bag of at most one token; a token's result is the weighted sum over a
bag of its kept rows; and the gradients are the same two with the roles exchanged. torch's embedding
bag computes all four in one pass each: it accumulates in float32, rounds once, never touches a row
that is in no bag, and gives zeros for an empty bag.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from portmoe.backends.torch.dispatch import REARRANGE
from portmoe.ops.operation import Implementation

CHUNK_ELEMENTS = 2**18  # of rows picked at once for the weights' gradient: they stay in the cache


def bag_dispatch(x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    """The contract of ``dispatch``."""
    return _Dispatch.apply(x_SH, row_KS, rows)


def bag_combine(y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
    """The contract of ``combine``."""
    return _Combine.apply(y_RH, row_KS, weight_KS)


class Bags(NamedTuple):
    """N bags of the A kept choices: bag n holds entries offset[n] … offset[n+1] − 1."""

    source_A: torch.Tensor  # int64, the row of the source each entry reads
    choice_A: torch.Tensor  # int64, which of the K·S choices, laid out as row_KS, the entry is
    offset_N1: torch.Tensor  # int64, N + 1 numbers


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(row_KS)
        ctx.rows = rows
        return _sum_bags(x_SH, _tokens_of_rows(row_KS, rows))

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (row_KS,) = ctx.saved_tensors
        return _sum_bags(grad_RH, _rows_of_tokens(row_KS, ctx.rows)), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y_RH, row_KS, weight_KS)
        return _sum_bags(y_RH, _rows_of_tokens(row_KS, y_RH.shape[0]), weight_KS)

    @staticmethod
    def backward(ctx: Any, grad_SH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y_RH, row_KS, weight_KS = ctx.saved_tensors
        rows = y_RH.shape[0]
        grad_y_RH = grad_weight_KS = None
        if ctx.needs_input_grad[0]:
            grad_y_RH = _sum_bags(grad_SH, _tokens_of_rows(row_KS, rows), weight_KS)
        if ctx.needs_input_grad[2]:
            grad_weight_KS = _row_products(grad_SH, y_RH, row_KS).to(weight_KS.dtype)
        return grad_y_RH, None, grad_weight_KS


def _tokens_of_rows(row_KS: torch.Tensor, rows: int) -> Bags:
    """A bag per buffer row: the token it receives, or nothing."""
    choices = row_KS.numel()
    choice_R1 = row_KS.new_full((rows + 1,), choices)  # the last entry takes the dropped choices
    choice_R1.scatter_(0, row_KS.flatten().clamp(max=rows), torch.arange(choices, device=row_KS.device))
    choice_R = choice_R1[:rows]
    kept_R = choice_R < choices
    choice_A = choice_R[kept_R]
    return Bags(choice_A % max(1, row_KS.shape[1]), choice_A, _offsets(kept_R))


def _rows_of_tokens(row_KS: torch.Tensor, rows: int) -> Bags:
    """A bag per token: the rows of its kept choices, in the order of the choices."""
    choice_SK = torch.arange(row_KS.numel(), device=row_KS.device).view_as(row_KS).t()
    row_SK = row_KS.t()
    kept_SK = row_SK < rows
    return Bags(row_SK[kept_SK], choice_SK[kept_SK], _offsets(kept_SK.sum(1)))


def _offsets(size_N: torch.Tensor) -> torch.Tensor:
    return F.pad(size_N.cumsum(0), (1, 0))


def _sum_bags(source_NH: torch.Tensor, bags: Bags, weight_KS: torch.Tensor | None = None) -> torch.Tensor:
    """[N, H]: per bag the sum of its entries' source rows, each times its choice's weight."""
    entry_A, offset_N1 = bags.source_A, bags.offset_N1
    if not entry_A.numel():
        return source_NH.new_zeros(offset_N1.numel() - 1, source_NH.shape[1])
    weight_A = None
    if weight_KS is not None:
        weight_A = weight_KS.flatten()[bags.choice_A]
        if source_NH.dtype.itemsize < weight_A.dtype.itemsize:
            # The weights must have the rows' dtype: as a sum of two such numbers none is rounded away.
            high_A = weight_A.to(source_NH.dtype)
            low_A = (weight_A - high_A).to(source_NH.dtype)
            weight_A = torch.stack((high_A, low_A), dim=1).flatten()
            entry_A, offset_N1 = entry_A.repeat_interleave(2), offset_N1 * 2
        weight_A = weight_A.to(source_NH.dtype)
    return F.embedding_bag(
        entry_A,
        source_NH.detach().contiguous(),
        offset_N1,
        mode="sum",
        per_sample_weights=weight_A,
        include_last_offset=True,
    )


def _row_products(grad_SH: torch.Tensor, y_RH: torch.Tensor, row_KS: torch.Tensor) -> torch.Tensor:
    """[K, S]: y[row] · grad[token], summed in float32; 0 where the choice is dropped."""
    rows, (choices, tokens) = y_RH.shape[0], row_KS.shape
    wide = torch.promote_types(grad_SH.dtype, torch.float32)
    product_KS = torch.zeros(choices, tokens, dtype=wide, device=grad_SH.device)
    if not rows or not tokens:
        return product_KS
    step = max(1, CHUNK_ELEMENTS // max(1, grad_SH.shape[1]))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        grad_CH = grad_SH[part].to(wide)
        for row_C, product_C in zip(row_KS[:, part], product_KS[:, part], strict=True):
            picked_CH = y_RH.index_select(0, row_C.clamp(max=rows - 1)).to(wide)
            torch.sum(picked_CH.mul_(grad_CH), dim=1, out=product_C)
    return product_KS.masked_fill_(row_KS >= rows, 0.0)


ALL = (
    Implementation("dispatch", "bag", bag_dispatch, requested_by=REARRANGE),
    Implementation("combine", "bag", bag_combine, requested_by=REARRANGE),
)
