"""The vendor's fused function under portmoe's contract: its shapes, its strides, its gradients."""

from typing import Any

import torch


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
        from portmoe_newvendor import runtime

        gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
        ctx.save_for_backward(gate_TF, up_TF)
        return runtime.swiglu(gate_TF, up_TF)

    @staticmethod
    def backward(ctx: Any, grad_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from portmoe_newvendor import runtime

        gate_TF, up_TF = ctx.saved_tensors
        grads = runtime.swiglu_backward(grad_TF.contiguous(), gate_TF, up_TF)
        return grads[0].to(gate_TF.dtype), grads[1].to(up_TF.dtype)


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """The contract is in portmoe/ops/swiglu.py."""
    return _Swiglu.apply(gate_TF, up_TF)
