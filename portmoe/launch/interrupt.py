"""SIGTERM, SIGINT and SIGHUP as a request to stop after the current step."""

import os
import signal
import threading
from collections.abc import Callable, Iterable
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

    ``told`` is called with the first signal, at once: in a thread of its own, for Python's handlers wait
    until the main thread comes out of what it computes.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the first signal that came
        self.told: Callable[[signal.Signals], None] | None = None
        self._interrupts = 0
        self._former: dict[signal.Signals, object] = {}
        self._watch: _Watch | None = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in heeded()}
            self._watch = _Watch(set(self._former), self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch:
            self._watch.close()
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _tell(self, number: signal.Signals) -> None:
        if self.told:
            self.told(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)


class _Watch:
    """Calls ``told`` with the first of ``signals``, from a thread that a pipe wakes when it arrives."""

    def __init__(self, signals: set[signal.Signals], told: Callable[[signal.Signals], None]) -> None:
        self._signals, self._told = signals, told
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._former = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._wait, name="portmoe-interrupt", daemon=True)
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._former)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _wait(self) -> None:
        told = False
        while numbers := os.read(self._read, 64):
            for number in numbers:
                if number in self._signals and not told:
                    told = True
                    self._told(signal.Signals(number))
