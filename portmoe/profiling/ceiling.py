"""The measured ceilings of a device: how fast its matrix products and its memory are."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from portmoe.accelerator import Device

# Square matrices and bytes that fill a processor, and that fill an accelerator.
HOST_MATRIX, MATRIX = (512, 1024, 2048), (2048, 4096, 8192)
HOST_COPY_BYTES, COPY_BYTES = 2**27, 2**30
BUDGET = 0.5  # seconds for which calls are repeated


class Ceiling:
    """What one device does at most, measured as it is asked for.

    Args:
        part: the backend's device part.
        device: the device that is open.
        linear: what computes the model's products.
    """

    def __init__(
        self, part: Device, device: torch.device, linear: Callable[..., torch.Tensor] = F.linear
    ) -> None:
        self._part = part
        self._linear = linear
        self._device = device

    def matmul_flops(self, dtype: torch.dtype, sizes: tuple[int, ...] = ()) -> float:
        """The highest FLOP/s of products of square matrices of these sizes."""
        sizes = sizes or (HOST_MATRIX if self._part.on_host else MATRIX)
        return max(2 * n**3 / self._product_seconds(dtype, n) for n in sizes)

    def copy_bytes_per_second(self, size: int | None = None) -> float:
        """Return the speed of a copy of ``size`` bytes, bytes read and bytes written counted."""
        size = size or (HOST_COPY_BYTES if self._part.on_host else COPY_BYTES)
        source = torch.ones(size, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return 2 * size / self.fastest(lambda: target.copy_(source))

    def fastest(self, call: Callable[[], object], budget: float = BUDGET) -> float:
        """Seconds of the fastest of as many calls as fit ``budget``, at least three, after one to warm up."""
        call()
        times: list[float] = []
        while len(times) < 3 or sum(times) < budget:
            self._part.synchronize()
            began = time.perf_counter()
            call()
            self._part.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    def _product_seconds(self, dtype: torch.dtype, n: int) -> float:
        a, b = (torch.ones(n, n, dtype=dtype, device=self._device) for _ in range(2))
        return self.fastest(lambda: self._linear(a, b, None))
