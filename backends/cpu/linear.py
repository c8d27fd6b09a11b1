"""Linear maps in float32, for processors that lack units for a 16-bit type."""

from typing import Any

import torch
import torch.nn.functional as F

from portmoe.backends.cpu.products import through_float32
from portmoe.ops.operation import Implementation


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """The contract of ``linear``, rounded once from float32."""
    return _Float32Linear.apply(x_TI, weight_OI, bias_O)


class _Float32Linear(torch.autograd.Function):
    """Keeps input and weight in their own dtype."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        bias_O = None if bias_O is None else bias_O.float()
        return F.linear(x_TI.float(), weight_OI.float(), bias_O).to(x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_TO = grad_TO.float()
        rows_RO = grad_TO.flatten(0, -2)
        grad_x_TI = (grad_TO @ weight_OI.float()).to(x_TI.dtype) if wants_x else None
        grad_weight_OI = None
        if wants_weight:
            grad_weight_OI = (rows_RO.t() @ x_TI.flatten(0, -2).float()).to(weight_OI.dtype)
        grad_bias_O = rows_RO.sum(0).to(weight_OI.dtype) if wants_bias else None
        return grad_x_TI, grad_weight_OI, grad_bias_O


ALL = (Implementation("linear", "through_float32", linear, through_float32),)
