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
from collections.abc import Mapping, Sequence
from pathlib import Path

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("portmoe.training.run", "portmoe.cli.main", "portmoe.cli.train", "worlds"),
        *("tensorboard.summary", "numpy.random", "torch._dynamo"),  # imported by runs only
    ]
)


class Portmoe:
    """One ``portmoe`` with these arguments, with the interface of ``subprocess.Popen`` as far as it is used.

    Its standard output and error go into one text. It leads a session of its own.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.arguments = list(arguments)
        self._output = Path(tempfile.mkstemp(prefix="portmoe-", suffix=".out")[1])
        self._process = CONTEXT.Process(
            target=_portmoe, args=(self.arguments, dict(environment), str(self._output), os.getcwd())
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

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout, self._output.read_text())
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end; gives what it has said."""
        self.wait(timeout)
        said = self._output.read_text(errors="replace")
        self._output.unlink()
        return said, None


def portmoe(
    arguments: Sequence[str], environment: Mapping[str, str], timeout: float = 280
) -> "subprocess.CompletedProcess[str]":
    """Run one to its end; both its outputs are in ``stdout``."""
    process = Portmoe(arguments, environment)
    try:
        said, _ = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.arguments, process.returncode, said, said)


def _portmoe(arguments: list[str], environment: dict[str, str], output: str, folder: str) -> None:
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
    sys.argv = ["portmoe", *arguments]
    import torch

    from portmoe.cli.main import run

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.exit(run(arguments))
