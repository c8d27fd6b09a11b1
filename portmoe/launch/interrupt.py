"""SIGTERM and SIGINT as a request to stop after the current step."""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """While entered, SIGTERM and SIGINT only raise a flag; on leaving, the former handlers are back.

    A second SIGINT raises ``KeyboardInterrupt`` at once. The flag is this process's alone: ranks
    must agree on it (a maximum over all of them) before they act, or one of them waits for ever.
    Outside the main thread, where Python cannot install handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the first signal that came
        self._interrupts = 0
        self._former: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self.received is not None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
