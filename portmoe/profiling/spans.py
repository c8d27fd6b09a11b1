"""Marks that tell a profile which part of the model runs.

A mark is a named span of ``torch.profiler``. Those inside a layer are put on only while profiling, by hooks
around modules and by wrapping the chosen operations, so that an ordinary step carries none of them. The
backward pass needs no marks: torch records which forward operation each of its nodes belongs to.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from torch.profiler import record_function

from portmoe.ops import OpTable

PREFIX = "portmoe::"
OPTIMIZER, WAITING = "optimizer", "waiting"

OPERATIONS = {
    "topk_gating": "router",
    "megablock_gating": "router",
    "softmax_gating": "router",
    "dispatch": "dispatch",
    "combine": "combine",
    "cross_entropy": "loss",
}


def span(part: str) -> record_function:
    """A context manager that marks what runs inside it as ``part``."""
    return record_function(PREFIX + part)


def marked_operations(ops: OpTable) -> OpTable:
    """``ops`` with the functions of ``OPERATIONS`` marked; the record of the choice is the same."""

    def marked(op: str, site: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return _marked(function, OPERATIONS[op]) if op in OPERATIONS else function

    return ops.wrapped(marked)


def mark_modules(model: nn.Module) -> None:
    """Mark every module of ``model`` whose class names its ``part`` of a step, for good."""
    for module in model.modules():
        if part := getattr(module, "part", ""):
            _mark(module, part)


def _mark(module: nn.Module, part: str) -> None:
    open_spans: list[record_function] = []

    def enter(module: nn.Module, arguments: Any) -> None:
        open_spans.append(span(part))
        open_spans[-1].__enter__()

    def leave(module: nn.Module, arguments: Any, result: Any) -> None:
        open_spans.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def _marked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @wraps(function)
    def call(*arguments: Any, **settings: Any) -> Any:
        with span(part):
            return function(*arguments, **settings)

    return call
