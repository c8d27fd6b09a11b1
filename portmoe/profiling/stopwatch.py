"""Timing spans of device work without waiting for each."""

import time

import torch


class Stopwatch:
    """Adds up spans of work submitted between ``start`` and ``stop``.

    Where torch has events for the device, they mark the spans in the device's own queue, and ``seconds``
    waits for the last of them. Where it has none, work is done when the call returns, by the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_host = not _has_events(device)
        self._spans: list[tuple] = []
        self._began: torch.Event | float | None = None

    def start(self) -> None:
        """Begin a span."""
        self._began = self._mark()

    def stop(self) -> None:
        """End the span that was begun last."""
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
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event


def _has_events(device: torch.device) -> bool:
    try:
        torch.Event(device=device, enable_timing=True).record()
    except RuntimeError:
        return False
    return True
