"""Dispatch and combine as gathers in both directions.

A row receives at most one token, so the map from tokens to rows can be inverted once; then
forward and backward only read rows by index. Nothing is scattered or added atomically, and the
sums over a token's choices run in a fixed order.
"""

from typing import Any

import torch

from portmoe.ops.operation import Implementation


def dispatch(x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    """The contract of ``dispatch``."""
    return _Dispatch.apply(x_SH, row_KS, rows)


def combine(y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
    """The contract of ``combine``."""
    return _Combine.apply(y_RH, row_KS, weight_KS)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(row_KS)
        return _rows_or_zero(x_SH, _token_of_row(row_KS, rows))

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (row_KS,) = ctx.saved_tensors
        wide = torch.promote_types(grad_RH.dtype, torch.float32)
        grad_SH = grad_RH.new_zeros(row_KS.shape[1], grad_RH.shape[1], dtype=wide)
        for row_S in row_KS:
            grad_SH += _rows_or_zero(grad_RH, row_S)
        return grad_SH.to(grad_RH.dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y_RH, row_KS, weight_KS)
        wide = torch.promote_types(y_RH.dtype, torch.float32)
        out_SH = y_RH.new_zeros(row_KS.shape[1], y_RH.shape[1], dtype=wide)
        for row_S, weight_S in zip(row_KS, weight_KS.to(wide), strict=True):
            out_SH.addcmul_(_rows_or_zero(y_RH, row_S).to(wide), weight_S[:, None])
        return out_SH.to(y_RH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_SH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y_RH, row_KS, weight_KS = ctx.saved_tensors
        rows = y_RH.shape[0]
        wide = torch.promote_types(grad_SH.dtype, torch.float32)
        grad_y_RH = grad_weight_KS = None
        if ctx.needs_input_grad[0]:
            # Rows without a token keep weight 0, and so a gradient of 0.
            weight_R = weight_KS.new_zeros(rows + 1, dtype=wide)
            weight_R.scatter_(0, row_KS.clamp(max=rows).flatten(), weight_KS.to(wide).flatten())
            spread_RH = _rows_or_zero(grad_SH, _token_of_row(row_KS, rows))
            grad_y_RH = spread_RH.to(wide).mul_(weight_R[:rows, None]).to(y_RH.dtype)
        if ctx.needs_input_grad[2]:
            grad = grad_SH.to(wide)
            grad_K = [(_rows_or_zero(y_RH, row_S).to(wide) * grad).sum(dim=1) for row_S in row_KS]
            grad_weight_KS = torch.stack(grad_K).to(weight_KS.dtype)
        return grad_y_RH, None, grad_weight_KS


def _token_of_row(row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    """[R] int64: the token each row receives; S where none."""
    choices, tokens = row_KS.shape
    token_R = row_KS.new_full((rows + 1,), tokens)  # the last entry takes the dropped choices
    token_A = torch.arange(tokens, device=row_KS.device).expand(choices, tokens).flatten()
    return token_R.scatter_(0, row_KS.clamp(max=rows).flatten(), token_A)[:rows]


def _rows_or_zero(source_RH: torch.Tensor, row_S: torch.Tensor) -> torch.Tensor:
    """The rows asked for; zeros for a row past the end. A fresh tensor."""
    rows = source_RH.shape[0]
    if rows == 0:
        return source_RH.new_zeros(row_S.shape[0], source_RH.shape[1])
    picked_SH = source_RH.index_select(0, row_S.clamp(max=rows - 1))
    return picked_SH.masked_fill_((row_S >= rows)[:, None], 0.0)


REARRANGE = "moe.enable_token_rearrange_opt"
DISPATCH_GATHER = Implementation("dispatch", "gather", dispatch, requested_by=REARRANGE)
COMBINE_GATHER = Implementation("combine", "gather", combine, requested_by=REARRANGE)
