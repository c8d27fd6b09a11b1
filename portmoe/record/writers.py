"""Where a run's records go: metrics.jsonl and its chain, train.log, TensorBoard events and the console.

All of it is written by one rank. Whatever the disk refuses becomes a ``TrainingError``.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TextIO

from portmoe.record import answers as of_answers
from portmoe.record.answers import ANSWERS, Answer
from portmoe.record.appended import AppendedFile, disk
from portmoe.record.chain import CHAIN, Chain
from portmoe.record.console import Console
from portmoe.record.events import EventFile
from portmoe.record.flat import as_now
from portmoe.record.log_line import to_json, to_text

METRICS = "metrics.jsonl"
LOG = "train.log"
EVENTS = "tensorboard"


class Writers:
    """Everything a run writes about its steps. On ranks that do not write every method does nothing."""

    def __init__(
        self,
        directory: Path,
        total_steps: int,
        tensorboard_queue: int,
        *,
        first_step: int = 0,
        ranks: int = 1,
        expert_ranks: int = 1,
        style: Literal["table", "full"] = "table",
        plain_every: int = 10,
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """
        Args:
            directory: of the run; exists.
            tensorboard_queue: steps whose events are kept back and written together.
            first_step: the first step that will be written. What an interrupted run has recorded for it and
                later steps is dropped from ``metrics.jsonl``, so that each step has one object.
            ranks: over how many ranks the tokens of a step are spread.
            expert_ranks: over how many ranks the experts are spread: in the log line, part of their name.
            style, plain_every: of the console.
            enabled: this rank writes.
            stream: of the console; standard output if None.

        Raises:
            TrainingError: a file cannot be opened or written. So does every method.
        """
        self._enabled = enabled
        if not enabled:
            return
        self._directory = directory
        self._expert_ranks = expert_ranks
        self._console = Console(
            stream or sys.stdout,
            total_steps,
            first_step=first_step,
            ranks=ranks,
            style=style,
            plain_every=plain_every,
        )
        drop_steps_from(directory / METRICS, first_step)
        drop_steps_from(directory / ANSWERS, first_step + 1)  # those of ``first_step`` came before it
        with disk(directory / CHAIN):
            self._chain = Chain(directory)
            self._chain.start(first_step, _now())
        self._metrics = AppendedFile(directory / METRICS)
        self._log = AppendedFile(directory / LOG)
        self._events = EventFile(directory / EVENTS, tensorboard_queue, first_step)

    def begin(self, text: str, lines: str) -> None:
        """Write what is about to run: ``text`` to train.log, its short form ``lines`` to the console."""
        if not self._enabled:
            return
        self._log.append(_stamped(text))
        self._console.note(lines)
        self._console.begin()

    def step(self, record: Mapping[str, Any], validation: Mapping[str, float] | None = None) -> None:
        """Write one step's record (see ``log_line.step_record``).

        ``validation`` holds what a validation after this step found, under keys of its own
        ("valid_loss"); it becomes part of the same object and line.
        """
        if not self._enabled:
            return
        record = {**record, **(validation or {})}
        line = to_text(record, self._expert_ranks)
        written = to_json({**record, "timestamp": _now()}) + "\n"
        self._metrics.append(written)
        with disk(self._directory / CHAIN):
            self._chain.step(record["step"], written)
        self._log.append(_stamped(line))
        self._console.step(record, line)
        problem = self._events.add(record)
        if problem:
            self.note(problem)

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Write what the model answers after so many steps."""
        if not self._enabled or not answers:
            return
        file = AppendedFile(self._directory / ANSWERS)
        file.append(of_answers.to_json(step, answers))
        file.close()
        self.note(of_answers.to_text(step, answers))

    def checkpoint(self, step: int, state_file: Path) -> None:
        """Chain a whole checkpoint to the run's record, also after ``close``; on the rank that writes."""
        with disk(self._directory / CHAIN):
            self._chain.checkpoint(step, state_file)

    def note(self, text: str) -> None:
        """Write ``text`` to console and train.log."""
        if not self._enabled:
            return
        self._console.note(text)
        self._log.append(_stamped(text))

    def say(self, text: str) -> None:
        """Show ``text`` on the console; from any thread."""
        if self._enabled:
            self._console.note(text)

    def conclude(self, text: str) -> None:
        """Write the run's last ``text``, once the bar is gone."""
        if self._enabled:
            self._console.close()
            self.note(text)

    def close(self) -> None:
        """Write what is held back and close the files. May be called again."""
        if not self._enabled:
            return
        self._enabled = False
        self._console.close()
        try:
            self._events.close()
        finally:
            self._metrics.close()
            self._log.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a ``metrics.jsonl``, in order, up to the first line that was not written to its end.

    Those that a former version wrote are in this one's form.
    """
    with path.open("rb") as file:
        for line in file:
            record = _parsed(line)
            if record is None:
                return
            yield as_now(record)


def last_record(path: Path) -> dict[str, Any] | None:
    """The newest whole object of a ``metrics.jsonl``, read from its end; None where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            taken = 1 << 16
            while True:
                file.seek(max(size - taken, 0))
                lines = file.read().splitlines(keepends=True)
                whole = lines if taken >= size else lines[1:]  # the first one may begin before
                if found := [record for line in whole[-2:] if (record := _parsed(line))]:
                    return as_now(found[-1])
                if taken >= size:
                    return None
                taken *= 4
    except OSError:
        return None


def drop_steps_from(path: Path, step: int) -> None:
    """Cut a ``metrics.jsonl``, if there is one, before its first object of ``step`` or later.

    A line that was not written to its end is cut as well.
    """
    if not path.exists():
        return
    keep = 0
    with disk(path), path.open("rb+") as file:
        for line in file:
            record = _parsed(line)
            if record is None or record["step"] >= step:
                break
            keep += len(line)
        file.truncate(keep)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object on ``line``; None if the line is torn, which a crash or a full disk can leave behind."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _stamped(text: str) -> str:
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    return "".join(f"{now} {line}\n" for line in text.splitlines())
