"""The router's logits by a compiled kernel, which widens tokens on the way instead of copying them."""

from typing import Any

import torch

from portmoe.backends.cpu.compiler import addresses, kernel, supports
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload

EXPERTS = 16  # more of them are better served by a matrix product


def router(x_SH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """The contract of ``router``, for float32 and bfloat16."""
    return _Router.apply(x_SH, weight_EH)


class _Router(torch.autograd.Function):
    """Keeps the tokens in their own dtype."""

    @staticmethod
    def forward(ctx: Any, x_SH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
        x_SH, weight_EH = x_SH.contiguous(), weight_EH.contiguous()
        ctx.save_for_backward(x_SH, weight_EH)
        logits_SE = weight_EH.new_empty(len(x_SH), len(weight_EH))
        sizes, pointers = (len(x_SH), *weight_EH.shape), addresses(x_SH, weight_EH, logits_SE)
        kernel("router", x_SH.dtype)(*sizes, *pointers, torch.get_num_threads())
        return logits_SE

    @staticmethod
    def backward(ctx: Any, grad_SE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_SH, weight_EH = ctx.saved_tensors
        grad_x_SH, threads = torch.empty_like(x_SH), torch.get_num_threads()
        grad_weight_PEH = weight_EH.new_zeros(threads, *weight_EH.shape)
        tensors = (x_SH, weight_EH, grad_SE.contiguous(), grad_x_SH, grad_weight_PEH)
        sizes = (len(x_SH), *weight_EH.shape)
        kernel("router_backward", x_SH.dtype)(*sizes, *addresses(*tensors), threads)
        return grad_x_SH, grad_weight_PEH.sum(0)


def _supports(workload: Workload) -> str | None:
    if workload.experts > EXPERTS:
        return f"{workload.experts} experts: for more than {EXPERTS} a matrix product is faster"
    return supports(workload)


ALL = (Implementation("router", "compiled", router, _supports),)
