"""Dispatch and combine by compiled kernels: one pass over memory forward, and one backward.

Neither a token's rows nor their gradients are copied, widened or masked on the way, and combine's
backward pass reads the gradient once for both of its results.
"""

from typing import Any

import torch

from portmoe.backends.cpu.compiler import addresses, kernel, require, supports
from portmoe.backends.torch.dispatch import REARRANGE
from portmoe.ops.operation import Implementation


def dispatch(x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    """The contract of ``dispatch``, for float32 and bfloat16."""
    return _Dispatch.apply(x_SH, row_KS.contiguous(), rows)


def combine(y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
    """The contract of ``combine``, for float32 and bfloat16."""
    return _Combine.apply(y_RH, row_KS.contiguous(), weight_KS.float().contiguous())


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(row_KS)
        x_SH = x_SH.contiguous()
        tokens, width = x_SH.shape
        tensors = _choice_of_row(row_KS, rows), x_SH, x_SH.new_empty(rows, width)
        sizes = (tokens, rows, width * x_SH.itemsize)
        require().copy_to_rows(*sizes, *addresses(*tensors), torch.get_num_threads())
        return tensors[-1]

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (row_KS,) = ctx.saved_tensors
        return _sum_of_rows(grad_RH, row_KS, None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y_RH, row_KS, weight_KS)
        return _sum_of_rows(y_RH, row_KS, weight_KS)

    @staticmethod
    def backward(ctx: Any, grad_SH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y_RH, row_KS, weight_KS = ctx.saved_tensors
        y_RH, grad_SH = y_RH.contiguous(), grad_SH.contiguous()
        (rows, width), tokens = y_RH.shape, row_KS.shape[1]
        grad_y_RH = torch.empty_like(y_RH)
        grad_weight_KS = torch.zeros(row_KS.shape, dtype=torch.float32)  # what is dropped is not written
        tensors = (_choice_of_row(row_KS, rows), weight_KS, y_RH, grad_SH, grad_y_RH, grad_weight_KS)
        sizes = (tokens, rows, width)
        kernel("weighted_rows", y_RH.dtype)(*sizes, *addresses(*tensors), torch.get_num_threads())
        return grad_y_RH, None, grad_weight_KS


def _choice_of_row(row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    """[R] int64: the number of the choice each row belongs to, as ``row_KS`` counts them; −1 for none."""
    choice_R = row_KS.new_empty(rows)
    require().choices_of_rows(row_KS.numel(), rows, *addresses(row_KS, choice_R))
    return choice_R


def _sum_of_rows(y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor | None) -> torch.Tensor:
    """[S, H]: per token the sum of its rows, each times its choice's weight."""
    y_RH, (choices, tokens) = y_RH.contiguous(), row_KS.shape
    rows, width = y_RH.shape
    out_SH = y_RH.new_empty(tokens, width)
    row, y, out = addresses(row_KS, y_RH, out_SH)
    weight = None if weight_KS is None else addresses(weight_KS)[0]
    sizes = (tokens, choices, rows, width)
    kernel("sum_of_rows", y_RH.dtype)(*sizes, row, weight, y, out, torch.get_num_threads())
    return out_SH


ALL = (
    Implementation("dispatch", "compiled", dispatch, supports, requested_by=REARRANGE),
    Implementation("combine", "compiled", combine, supports, requested_by=REARRANGE),
)
