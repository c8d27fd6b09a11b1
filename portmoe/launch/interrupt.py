"""SIGTERM, SIGINT and SIGHUP as a request to stop after the current step."""

import signal
import threading
from collections.abc import Iterable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def exit_code(number: int) -> int:
    """What a program ends with after a signal, as a shell reports it: 143 after SIGTERM."""
    return 128 + number


def heeded(signals: Iterable[signal.Signals] = SIGNALS) -> list[signal.Signals]:
    """Those of ``signals`` the caller has not set to be ignored, as ``nohup`` does SIGHUP."""
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]


class Interrupt:
    """While entered, the signals only raise a flag; on leaving, the former handlers are back.

    What the caller ignores stays ignored. A second SIGINT raises ``KeyboardInterrupt`` at once. The flag is
    this process's alone: ranks must agree on it (a maximum over all of them) before they act, or one of
    them waits for ever. Outside the main thread, where Python cannot install handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the first signal that came
        self._interrupts = 0
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in heeded()}
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
