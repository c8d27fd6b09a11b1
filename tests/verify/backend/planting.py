"""How a wrong implementation is planted: its list, and two ways to spoil a gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Fault:
    op: str
    name: str
    function: Callable[..., Any]
    dtype: torch.dtype = torch.float32  # the dtype it shows in
    shapes: str = "odd"  # and one of validation's shapes that shows it


FAULTS: list[Fault] = []


def fault(
    op: str, name: str, dtype: torch.dtype = torch.float32, shapes: str = "odd"
) -> Callable[[Callable], Callable]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS.append(Fault(op, name, function, dtype, shapes))
        return function

    return add


class Backward(torch.autograd.Function):
    """``forward`` with the gradient of ``backward``: two functions of the same arguments."""

    @staticmethod
    def forward(ctx, right, wrong, *args):
        ctx.wrong = wrong
        ctx.args = [a.detach().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in args]
        with torch.no_grad():
            return right(*args)

    @staticmethod
    def backward(ctx, grad):
        leaves = [a for a in ctx.args if torch.is_tensor(a) and a.requires_grad]
        with torch.enable_grad():
            out = ctx.wrong(*ctx.args)
        found = iter(torch.autograd.grad(out, leaves, grad, materialize_grads=True))
        grads = [next(found) if torch.is_tensor(a) and a.requires_grad else None for a in ctx.args]
        return None, None, *grads


class Scaled(torch.autograd.Function):
    """The identity whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None
