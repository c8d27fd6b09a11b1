"""Signals become a flag, and the former handlers come back."""

import os
import signal
import subprocess
import sys
import threading
import time
import zlib

import pytest

from portmoe.launch.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_only_raises_the_flag(number):
    with Interrupt() as interrupt:
        assert interrupt.received is None
        os.kill(os.getpid(), number)
        assert interrupt.received is number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_the_caller_ignores_stays_ignored(number):
    former = signal.signal(number, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), number)
            assert interrupt.received is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, former)


def test_sigterm_may_come_any_number_of_times():
    with Interrupt() as interrupt:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first SIGINT is a request too
        assert interrupt.received is signal.SIGTERM


def test_second_sigint_interrupts_at_once():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.received is signal.SIGINT


def test_former_handlers_come_back_even_after_an_error():
    seen = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(ValueError, match="boom"), Interrupt():
            raise ValueError("boom")
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, former)


def test_other_threads_may_enter_without_handlers():
    before = signal.getsignal(signal.SIGTERM)
    problems = []

    def enter():
        try:
            with Interrupt() as interrupt:
                assert interrupt.received is None
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert problems == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_signal_is_told_at_once_while_the_main_thread_computes():
    """Python's own handlers wait for such a call to end; it is a thread that answers."""
    told = []
    with Interrupt() as interrupt:
        interrupt.told = lambda number: told.append(time.monotonic())
        code = f"import os; os.kill({os.getpid()}, {signal.SIGTERM.value})"
        with subprocess.Popen([sys.executable, "-c", code]):
            zlib.compress(os.urandom(60_000_000), 9)
            ended = time.monotonic()
        assert interrupt.received is signal.SIGTERM
    assert told[0] < ended - 0.2
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_is_told_once():
    told = []
    with Interrupt() as interrupt:
        interrupt.told = told.append
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
    assert told == [signal.SIGTERM]
