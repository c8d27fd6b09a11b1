"""Timing spans of device work without waiting for each."""

import time

import torch


class Stopwatch:
    """Adds up spans of work submitted between ``start`` and ``stop``.

    On an accelerator the spans are marked by events in the device's own queue; ``seconds`` waits for the
    last of them. On the CPU work is done when the call returns, and the host clock tells.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_host = device.type == "cpu"
        self._spans: list[tuple] = []
        self._began: torch.Event | float | None = None

    def start(self) -> None:
        self._began = self._mark()

    def stop(self) -> None:
        self._spans.append((self._began, self._mark()))

    def seconds(self) -> float:
        """Total of the spans; forgets them."""
        spans, self._spans = self._spans, []
        if self._on_host:
            return sum(end - begin for begin, end in spans)
        for _, end in spans:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3

    def _mark(self) -> "torch.Event | float":
        if self._on_host:
            return time.perf_counter()
        event = torch.Event(enable_timing=True)
        event.record()
        return event
