"""Timing one implementation on an operation's own sample."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from portmoe.ops.operation import Operation, Sample
from portmoe.ops.workload import Workload

WARM_UP, REPEATS = 2, 5
BUDGET = 3.0  # seconds after which no further repeat begins


def seconds_per_call(
    operation: Operation, function: Callable[..., Any], workload: Workload, synchronize: Callable[[], None]
) -> float:
    """Median seconds of one forward and backward of ``function`` on the operation's first sample.

    After warming up; a call so slow that the budget is spent before is judged by its last repeat.

    Args:
        synchronize: waits for all work submitted to the workload's device, as ``Device.synchronize`` does.
    """
    generator = torch.Generator().manual_seed(0)
    sample = operation.samples(workload, generator)[0]
    times: list[float] = []
    while not times or (len(times) < WARM_UP + REPEATS and sum(times) < BUDGET):
        synchronize()
        start = time.perf_counter()
        _forward_backward(function, sample)
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:] or times[-1:])


def _forward_backward(function: Callable[..., Any], sample: Sample) -> None:
    outputs = function(*sample.args, **sample.kwargs)
    differentiable = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    inputs = [
        t
        for t in tree_leaves((sample.args, sample.kwargs))
        if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    if differentiable and inputs:
        torch.autograd.grad(
            differentiable, inputs, [torch.ones_like(t) for t in differentiable], allow_unused=True
        )
