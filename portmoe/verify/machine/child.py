"""Child processes that report by lines in a file, so that what they said survives how they end."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portmoe.accelerator.host_memory import likely_cause


@dataclass(frozen=True)
class Outcome:
    """How a child process ended and what it reported.

    Attributes:
        ending: None if it ended well, otherwise how it ended, in words.
        records: the JSON objects it reported.
        output: what it wrote to stderr.
    """

    ending: str | None
    records: list[dict[str, Any]]
    output: str

    @property
    def last_line(self) -> str:
        """The last line of its output, where Python puts an exception's message."""
        return next(
            (line.strip() for line in reversed(self.output.splitlines()) if line.strip()), "no output"
        )


def run_python(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str], timeout: float
) -> list[Outcome]:
    """Run ``python`` with each of the argument lists, all at once, and wait for all of them.

    A child finds the file to report to in PORTMOE_REPORT. Those that have not ended after ``timeout``
    seconds are killed.
    """
    with tempfile.TemporaryDirectory(prefix="portmoe-") as folder, ExitStack() as files:
        children = []
        for number, arguments in enumerate(commands):
            report = Path(folder, f"report-{number}")
            output = files.enter_context(Path(folder, f"output-{number}").open("w+b"))
            child = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **environment, "PORTMOE_REPORT": str(report)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
            )
            children.append((child, report, output))
        deadline = time.monotonic() + timeout
        return [
            Outcome(_end(child, deadline, timeout), _records(report), _text(output))
            for child, report, output in children
        ]


def report(record: Mapping[str, Any]) -> None:
    """Called in a child: add a record."""
    with Path(os.environ["PORTMOE_REPORT"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _end(child: subprocess.Popen[bytes], deadline: float, timeout: float) -> str | None:
    try:
        code = child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return f"did not end within {timeout:g} s"
    if code < 0:
        why = f", {likely_cause()}," if code == -signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{why}"
    return f"ended with exit code {code}" if code else None


def _records(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # a line cut off by a kill is left out
    return [json.loads(line) for line in lines]


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
