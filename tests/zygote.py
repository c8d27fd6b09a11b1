"""``portmoe …`` as processes forked from one that has imported torch, which takes seconds, once per worker.

What a process does is what the command does: its arguments, its environment, its output, its exit code and
the signals it takes are its own. That the command itself starts so is tested in ``cli/``, ``launch/``.
"""

import multiprocessing as mp
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("portmoe.training.run", "portmoe.cli.main", "portmoe.cli.train", "worlds"),
        *("tensorboard.summary", "numpy.random", "torch._dynamo"),  # imported by runs only
    ]
)


class Forked:
    """A process, the leader of a session, with the interface of ``subprocess.Popen`` as far as it is used.

    Its standard output and error go into one text.

    Args:
        main: what it runs, which gives its exit code; pickled.
        environment: all its variables.
    """

    def __init__(self, main: Callable[[], int | None], environment: Mapping[str, str]) -> None:
        self._output = Path(tempfile.mkstemp(prefix="forked-", suffix=".out")[1])
        self._process = CONTEXT.Process(
            target=_forked, args=(main, dict(environment), str(self._output), os.getcwd())
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def await_said(self, text: str, timeout: float = 120) -> None:
        """Wait until it has said ``text``."""
        deadline = time.monotonic() + timeout
        while text not in (said := self._output.read_text(errors="replace")):
            if time.monotonic() > deadline or self.poll() is not None:
                raise AssertionError(f"it did not say {text!r}, but:\n{said}")
            time.sleep(0.05)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end; gives what it has said."""
        self._process.join(timeout)
        said = self._output.read_text(errors="replace")
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout, said)
        self._output.unlink()
        return said, None


def ended(process: Forked, timeout: float = 280) -> "subprocess.CompletedProcess[str]":
    """Wait for its end; both its outputs are in ``stdout`` and in ``stderr``."""
    try:
        said, _ = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess("a forked process", process.returncode, said, said)


def start_portmoe(arguments: Sequence[str], environment: Mapping[str, str]) -> Forked:
    """``portmoe`` with these arguments."""
    return Forked(partial(_portmoe, list(arguments)), environment)


def portmoe(arguments: Sequence[str], environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run ``portmoe`` with these arguments to its end."""
    return ended(start_portmoe(arguments, environment))


def python(code: str, environment: Mapping[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run ``code`` as ``python -c`` does, in a process that has torch already, to its end."""
    return ended(Forked(partial(_python, code, arguments), environment))


def _portmoe(arguments: list[str]) -> int:
    from portmoe.cli.main import run

    sys.argv = ["portmoe", *arguments]
    return run(arguments)


def _python(code: str, arguments: Sequence[str]) -> None:
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def _forked(main: Callable[[], int | None], environment: dict[str, str], output: str, folder: str) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (the process's own)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.exit(main())
