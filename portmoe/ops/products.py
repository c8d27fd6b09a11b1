"""Matrix products on the CPU: sums written into given buffers, and what to do without 16-bit units."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# products(out, (a, b), …): out ← a·b + …
Products = Callable[..., None]


def native_products(out_MN: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """In the tensors' own dtype, by the processor's own units."""
    first, *others = pairs
    torch.mm(*first, out=out_MN)
    for pair in others:
        torch.addmm(out_MN, *pair, out=out_MN)


def float32_products(out_MN: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """In float32, rounded once at the end: as exact as 16-bit units that add up in float32."""
    first, *others = pairs
    sum_MN = torch.mm(*(t.float() for t in first))
    for pair in others:
        sum_MN.addmm_(*(t.float() for t in pair))
    out_MN.copy_(sum_MN)


@cache
def slow_in(dtype: torch.dtype) -> bool:
    """Whether this processor lacks instructions for matrix products of ``dtype``.

    Torch then multiplies number by number, some hundred times slower than in float32.
    """
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and not (torch.backends.mkldnn.is_available() and supported[dtype]())


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """``F.linear``; where the processor is slow in the dtype, through float32 and rounded once."""
    plain = type(weight_OI) in (torch.Tensor, nn.Parameter)  # not split over ranks by a tensor subclass
    if plain and x_TI.device.type == "cpu" and slow_in(x_TI.dtype):
        return _Float32Linear.apply(x_TI, weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


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
