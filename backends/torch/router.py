"""The router's logits, with the tokens kept in their own dtype."""

from typing import Any

import torch
import torch.nn.functional as F

from portmoe.ops.operation import Implementation


class _Router(torch.autograd.Function):
    """Keeps the tokens in their own dtype, and widens them once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_SH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_SH, weight_EH)
        return F.linear(x_SH.to(weight_EH.dtype), weight_EH)

    @staticmethod
    def backward(ctx: Any, grad_SE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_SH, weight_EH = ctx.saved_tensors
        return (grad_SE @ weight_EH).to(x_SH.dtype), grad_SE.t() @ x_SH.to(weight_EH.dtype)


ROUTER_LEAN = Implementation("router", "lean", _Router.apply)
