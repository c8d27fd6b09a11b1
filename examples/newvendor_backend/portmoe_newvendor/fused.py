"""The vendor's fused function under portmoe's contract: its shapes, its strides, its gradients."""

from typing import Any

import torch


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        from portmoe_newvendor import runtime

        x_TH, weight_H = x_TH.contiguous(), weight_H.contiguous()
        y_TH, rstd_T1 = runtime.rms_norm(x_TH, weight_H, eps)
        ctx.save_for_backward(x_TH, weight_H, rstd_T1)
        return y_TH

    @staticmethod
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        from portmoe_newvendor import runtime

        x_TH, weight_H, rstd_T1 = ctx.saved_tensors
        grad_x, grad_weight = runtime.rms_norm_backward(grad_TH.contiguous(), x_TH, weight_H, rstd_T1)
        return grad_x.to(x_TH.dtype), grad_weight.to(weight_H.dtype), None


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """The contract is in portmoe/ops/rms_norm.py."""
    return _RmsNorm.apply(x_TH, weight_H, eps)
