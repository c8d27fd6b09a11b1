"""RMSNorm and the rotary embedding by compiled kernels: one pass over memory forward, and one backward."""

from typing import Any

import torch

from portmoe.backends.cpu.compiler import NAMES, address, addresses, kernel, supports
from portmoe.backends.torch.rms_norm import RMS_NORM
from portmoe.ops.operation import Implementation


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """The contract of ``rms_norm``."""
    if x_TH.dtype not in NAMES or weight_H.dtype != x_TH.dtype:
        return RMS_NORM.function(x_TH, weight_H, eps)
    return _RmsNorm.apply(x_TH, weight_H, eps)


def rotary(
    x_TND: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """The contract of ``rotary``, for float32 and bfloat16."""
    return _Rotary.apply(x_TND, cos_TR.contiguous(), sin_TR.contiguous(), interleaved)


class _RmsNorm(torch.autograd.Function):
    """Keeps the input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        x_TH, weight_H = x_TH.contiguous(), weight_H.contiguous()
        width = weight_H.numel()
        rows = x_TH.numel() // width
        y_TH = torch.empty_like(x_TH)
        scale_T = torch.empty(rows, dtype=torch.float32)
        pointers = addresses(x_TH, weight_H, y_TH, scale_T)
        kernel("rms_norm", x_TH.dtype)(rows, width, eps, *pointers, torch.get_num_threads())
        ctx.save_for_backward(x_TH, weight_H, scale_T)
        return y_TH

    @staticmethod
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, weight_H, scale_T = ctx.saved_tensors
        grad_x_TH, threads = torch.empty_like(x_TH), torch.get_num_threads()
        grad_weight_PH = torch.zeros(threads, weight_H.numel(), dtype=torch.float32)
        tensors = (x_TH, weight_H, scale_T, grad_TH.contiguous(), grad_x_TH, grad_weight_PH)
        sizes = (scale_T.numel(), weight_H.numel())
        kernel("rms_norm_backward", x_TH.dtype)(*sizes, *addresses(*tensors), threads)
        return grad_x_TH, grad_weight_PH.sum(0).to(weight_H.dtype), None


class _Rotary(torch.autograd.Function):
    """Its gradient is the rotation the other way round."""

    @staticmethod
    def forward(
        ctx: Any, x_TND: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, interleaved: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.interleaved = interleaved
        return _rotated(x_TND, cos_TR, sin_TR, interleaved, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_TND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _rotated(grad_TND, *ctx.saved_tensors, ctx.interleaved, -1.0), None, None, None


def _rotated(
    x_TND: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, interleaved: bool, direction: float
) -> torch.Tensor:
    x_TND = x_TND if x_TND.stride(2) == 1 else x_TND.contiguous()  # heads and tokens may lie apart
    tokens, heads, width = x_TND.shape
    y_TND = x_TND.new_empty(x_TND.shape)
    sizes = (tokens, heads, width // 2, x_TND.stride(0), x_TND.stride(1))
    pointers = (address(x_TND), *addresses(cos_TR, sin_TR, y_TND))
    kernel("rotary", x_TND.dtype)(*sizes, interleaved, direction, *pointers, torch.get_num_threads())
    return y_TND


ALL = (
    Implementation("rms_norm", "compiled", rms_norm, supports),
    Implementation("rotary", "compiled", rotary, supports),
)
