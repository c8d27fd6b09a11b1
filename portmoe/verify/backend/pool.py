"""The memory part: pooled buffers come back, and steady work allocates nothing."""

import time
from collections.abc import Iterator

import torch

from portmoe.accelerator import Accelerator
from portmoe.accelerator.probing import describe
from portmoe.result import Result

SIZES = ((4096, torch.float32), (4096, torch.bfloat16), (1000, torch.float32))
STEPS = 20


def check_memory(accelerator: Accelerator, device: torch.device) -> Iterator[Result]:
    """Each trial returns what is wrong, or nothing."""
    trials = {"reuse": _reuse, "steady state": _steady_state, "statistics": _statistics}
    for name, trial in trials.items():
        began = time.perf_counter()
        try:
            wrong = trial(accelerator, device)
        except Exception as error:
            wrong = f"raised {describe(error)}"
        status = "fail" if wrong else "pass"
        yield Result(
            status, name, wrong, part="memory", subject="memory", seconds=time.perf_counter() - began
        )


def _reuse(accelerator: Accelerator, device: torch.device) -> str:
    """A buffer given back is handed out again, one that is out is not."""
    pool = accelerator.memory.pool
    for numel, dtype in SIZES:
        first, second = pool.take(numel, dtype, device), pool.take(numel, dtype, device)
        for buffer in (first, second):
            if (buffer.numel(), buffer.dtype, buffer.device) != (numel, dtype, device):
                return f"asked for {numel} × {dtype} on {device}, got {buffer.numel()} × {buffer.dtype}"
        if first.data_ptr() == second.data_ptr():
            return "one buffer was handed out twice"
        place = first.data_ptr()
        pool.give(first)
        if pool.take(numel, dtype, device).data_ptr() != place:
            return f"a buffer of {numel} × {dtype} that was given back was not handed out again"
        pool.give(second)
    return ""


def _steady_state(accelerator: Accelerator, device: torch.device) -> str:
    """After a first round, rounds of taking, writing and giving back create no buffer."""
    pool = accelerator.memory.pool

    def work() -> None:
        taken = [pool.take(numel, dtype, device) for numel, dtype in SIZES]
        for buffer in taken:
            buffer.fill_(1)
        for buffer in taken:
            pool.give(buffer)

    work()
    before = pool.allocations
    for _ in range(STEPS):
        work()
    made = pool.allocations - before
    return f"{made} buffers were allocated in {STEPS} rounds after the first" if made else ""


def _statistics(accelerator: Accelerator, device: torch.device) -> str:
    """A buffer of 64 MiB shows in the bytes allocated and in the peak.

    A host's allocator may serve anything up to 32 MiB from pages the process holds already.
    """
    memory = accelerator.memory
    memory.reset_peak()
    before = memory.allocated()
    buffer = torch.ones(2**26, dtype=torch.uint8, device=device)
    accelerator.device.synchronize()
    counted, peak = memory.allocated() - before, memory.peak()
    expected = buffer.numel()
    if counted < expected // 2 or peak < before + expected // 2:
        return f"{expected} bytes allocated, {counted} counted, peak {peak - before} above the start"
    return ""
