"""Faults planted on purpose: in the stand-in's functions (npu_…) and in torch's own operations (aten::…).

``SIMULATED_NPU_FAULTS`` holds the same specifications as ``planted`` takes, separated by spaces:

    lack:OP               there is no such function, or no kernel
    fail:OP               the function raises a RuntimeError
    crash:OP              the process ends as by a segmentation fault of the driver
    hang:OP               the call never returns
    slow:OP:SECONDS       every call takes that much longer
    wrong:OP:FACTOR       the first result comes multiplied by FACTOR (nan: it is NaN)
    gradient:OP:FACTOR    the gradient of every input comes multiplied by FACTOR; for a function without
                          autograd of its own, what it returns in a backward pass; not for aten::…
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

VARIABLE = "SIMULATED_NPU_FAULTS"
PRODUCT = "SIMULATED_NPU_PRODUCT"
KINDS = ("lack", "fail", "crash", "hang", "slow", "wrong", "gradient")


@dataclass(frozen=True)
class Fault:
    kind: str
    op: str
    amount: float


_planted: list[Fault] = []


def parse(text: str) -> Fault:
    """One specification, as in the module's docstring."""
    kind, _, rest = text.partition(":")
    name, _, amount = rest.rpartition(":") if kind in ("slow", "wrong", "gradient") else (rest, "", "1")
    native = name.startswith("aten::")
    if kind not in KINDS or not name or (native and kind in ("fail", "crash", "hang", "gradient")):
        raise ValueError(f"{text!r} is no fault this device knows: see {__name__}")
    return Fault(kind, name, float(amount))


def from_environment() -> None:
    """Plant what the environment asks for."""
    _plant([parse(text) for text in os.environ.get(VARIABLE, "").split()])


@contextmanager
def planted(*specifications: str) -> Iterator[None]:
    """These faults and no others, inside the block."""
    before = list(_planted)
    _plant([parse(text) for text in specifications])
    try:
        yield
    finally:
        _plant(before)


@contextmanager
def memory_limit(bytes_: int) -> Iterator[None]:
    """A device with that much memory, inside the block."""
    compiled = torch.ops.simulated_npu
    before = compiled.memory_limit()
    compiled.set_memory_limit(bytes_)
    try:
        yield
    finally:
        compiled.set_memory_limit(before)


@contextmanager
def product(name: str) -> Iterator[None]:
    """A device of that product, "A2" or "A3", inside the block."""
    before = npu_product()
    os.environ[PRODUCT] = name
    try:
        yield
    finally:
        os.environ[PRODUCT] = before


def npu_product() -> str:
    """Which product the device stands for."""
    return os.environ.get(PRODUCT, "A2")


def lacking() -> set[str]:
    """The functions that are not there."""
    return {fault.op for fault in _planted if fault.kind == "lack"}


def subject_to_faults(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with whatever is planted in it when it is called."""
    name = function.__name__

    def call(*args: Any, **kwargs: Any) -> Any:
        mine = [fault for fault in _planted if fault.op == name]
        for fault in mine:
            if fault.kind == "fail":
                raise RuntimeError(f"call {name} failed (planted in the simulated npu)")
            if fault.kind == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if fault.kind == "hang":
                threading.Event().wait()
            if fault.kind == "slow":
                time.sleep(fault.amount)
        wrong = [fault for fault in mine if fault.kind == "wrong"]
        scaled = [fault for fault in mine if fault.kind == "gradient"]
        if scaled and getattr(function, "without_autograd", False):
            wrong = scaled if torch._C._current_graph_task_id() >= 0 else []
        elif scaled:
            args = tuple(_with_gradient(arg, scaled[0].amount) for arg in args)
            kwargs = {key: _with_gradient(arg, scaled[0].amount) for key, arg in kwargs.items()}
        result = function(*args, **kwargs)
        return _with_value(result, wrong[0].amount) if wrong else result

    call.__name__ = name
    call.__doc__ = function.__doc__
    return call


def _plant(faults: list[Fault]) -> None:
    _planted[:] = faults
    compiled = torch.ops.simulated_npu
    compiled.clear_faults()
    for fault in faults:
        if fault.op.startswith("aten::"):
            compiled.plant(
                fault.op,
                fault.kind == "lack",
                fault.amount if fault.kind == "wrong" else 1.0,
                fault.amount if fault.kind == "slow" else 0.0,
            )


class _Scale(torch.autograd.Function):
    """x · forward, whose gradient is grad · backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.backward_factor = backward
        return x.view_as(x) if forward == 1.0 else x * forward

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad if ctx.backward_factor == 1.0 else grad * ctx.backward_factor, None, None


def _with_gradient(argument: Any, factor: float) -> Any:
    if isinstance(argument, torch.Tensor) and argument.requires_grad:
        return _Scale.apply(argument, 1.0, factor)
    if isinstance(argument, list):
        return [_with_gradient(item, factor) for item in argument]
    return argument


def _with_value(result: Any, factor: float) -> Any:
    """The first result alone is wrong; its gradient is not."""
    if isinstance(result, torch.Tensor):
        return _Scale.apply(result, factor, 1.0) if result.requires_grad else result.mul_(factor)
    first, *rest = result
    return type(result)([_with_value(first, factor), *rest])
