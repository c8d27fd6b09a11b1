"""Matrix products on the CPU: sums written into given buffers, and what to do without 16-bit units."""

from collections.abc import Callable
from functools import cache

import torch

from portmoe.ops.workload import Workload

# products(out, (a, b), …): out ← a·b + …
Products = Callable[..., None]


def direct_products(out_MN: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Products in the tensors' own dtype, by the processor's own units."""
    first, *others = pairs
    torch.mm(*first, out=out_MN)
    for pair in others:
        torch.addmm(out_MN, *pair, out=out_MN)


def float32_products(out_MN: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Products in float32, rounded once at the end: as exact as 16-bit units that add up in float32."""
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


def factor(t: torch.Tensor) -> torch.Tensor:
    """``t`` as products take it: in float32 where the processor is slow in its dtype."""
    return t.float() if slow_in(t.dtype) else t


def direct(workload: Workload) -> str | None:
    """Supports what the processor multiplies by itself."""
    if slow_in(workload.dtype):
        return f"this processor has no matrix units for {workload.dtype}"
    return None


def through_float32(workload: Workload) -> str | None:
    """Supports what it does not."""
    if not slow_in(workload.dtype):
        return f"this processor computes products of {workload.dtype} itself"
    return None
