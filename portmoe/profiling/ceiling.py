"""The measured ceilings of a device: how fast its matrix products and its memory are."""

import time
from collections.abc import Callable

import torch

from portmoe.ops.products import linear

# Square matrices and bytes that fill a processor, and that fill an accelerator.
MATRIX = {True: (512, 1024, 2048), False: (2048, 4096, 8192)}
COPY_BYTES = {True: 2**27, False: 2**30}
BUDGET = 0.5  # seconds for which calls are repeated


def matmul_flops(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = ()) -> float:
    """The highest FLOP/s of products of square matrices of these sizes, as the model's products compute."""
    return max(2 * n**3 / _product_seconds(device, dtype, n) for n in sizes or MATRIX[device.type == "cpu"])


def copy_bytes_per_second(device: torch.device, size: int | None = None) -> float:
    """Of a copy of ``size`` bytes, bytes read and bytes written counted."""
    size = size or COPY_BYTES[device.type == "cpu"]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / fastest(device, lambda: target.copy_(source))


def fastest(device: torch.device, call: Callable[[], object], budget: float = BUDGET) -> float:
    """Seconds of the fastest of as many calls as fit ``budget``, at least three, after one to warm up."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _product_seconds(device: torch.device, dtype: torch.dtype, n: int) -> float:
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    return fastest(device, lambda: linear(a, b, None))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
