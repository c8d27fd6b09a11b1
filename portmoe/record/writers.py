"""Where a run's records go: metrics.jsonl and its chain, train.log, TensorBoard events and the console.

All of it is written by one rank. Whatever the disk refuses becomes a ``TrainingError``.
"""

import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from portmoe.errors import TrainingError
from portmoe.record.chain import CHAIN, Chain
from portmoe.record.console import Console
from portmoe.record.flat import as_now, flat
from portmoe.record.log_line import OF_REPLAY, to_json, to_text

METRICS = "metrics.jsonl"
LOG = "train.log"
EVENTS = "tensorboard"
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{1,18})\.")


class Writers:
    """Everything a run writes about its steps. On ranks that do not write every method does nothing."""

    def __init__(
        self,
        directory: Path,
        total_steps: int,
        terminal: bool,
        tensorboard_queue: int,
        *,
        first_step: int = 0,
        expert_ranks: int = 1,
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """
        Args:
            directory: of the run; exists.
            terminal: draw a progress line instead of printing every step's line.
            tensorboard_queue: steps whose events are kept back and written together.
            first_step: the first step that will be written. What an interrupted run has recorded for it and
                later steps is dropped from ``metrics.jsonl``, so that each step has one object.
            expert_ranks: over how many ranks the experts are spread: in the log line, part of their name.
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
        self._console = Console(stream or sys.stdout, terminal, total_steps)
        drop_steps_from(directory / METRICS, first_step)
        with _disk(directory / CHAIN):
            self._chain = Chain(directory)
            self._chain.start(first_step, _now())
        self._metrics = _AppendedFile(directory / METRICS)
        self._log = _AppendedFile(directory / LOG)
        self._events = _EventFile(directory / EVENTS, tensorboard_queue, first_step)

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
        with _disk(self._directory / CHAIN):
            self._chain.step(record["step"], written)
        self._log.append(_stamped(line))
        self._console.step(record, line)
        problem = self._events.add(record)
        if problem:
            self.note(problem)

    def checkpoint(self, step: int, state_file: Path) -> None:
        """Chain a whole checkpoint to the run's record, also after ``close``; on the rank that writes."""
        with _disk(self._directory / CHAIN):
            self._chain.checkpoint(step, state_file)

    def note(self, text: str) -> None:
        """Write ``text`` to console and train.log."""
        if not self._enabled:
            return
        self._console.note(text)
        self._log.append(_stamped(text))

    def conclude(self, text: str) -> None:
        """Write the run's last ``text``, under the progress line as it stands."""
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


def drop_steps_from(path: Path, step: int) -> None:
    """Cut a ``metrics.jsonl``, if there is one, before its first object of ``step`` or later.

    A line that was not written to its end is cut as well.
    """
    if not path.exists():
        return
    keep = 0
    with _disk(path), path.open("rb+") as file:
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


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror or error}; "
            "free space there, check its permissions, or choose another run.directory"
        ) from error


class _AppendedFile:
    """A text file where everything appended is handed to the system at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _disk(path):
            self._file = path.open("ab", buffering=0)

    def append(self, text: str) -> None:
        rest = memoryview(text.encode("utf-8", "backslashreplace"))
        with _disk(self._path):
            while rest:  # a disk that fills up takes a part first
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()


class _EventFile:
    """Scalars in a TensorBoard event file.

    ``tensorboard`` is imported when the first events are due, so that it does not delay the first step.
    Events are framed by tensorboard's own writer but written in this thread: its asynchronous writer reports
    a full disk with a traceback from a thread.
    """

    def __init__(self, directory: Path, queue: int, first_step: int) -> None:
        self._path = directory / _event_file_name(directory)
        self._queue = queue
        self._first_step = first_step
        self._held: list[tuple[float, Mapping[str, Any]]] = []
        self._writer: Any = None
        self._usable = True

    def add(self, record: Mapping[str, Any]) -> str | None:
        """Take the numbers of ``record``; returns a note for the user if events cannot be written at all."""
        if not self._usable:
            return None
        self._held.append((time.time(), record))
        return self._flush() if len(self._held) >= self._queue else None

    def close(self) -> None:
        if self._usable and self._held:
            self._flush()
        if self._writer is not None:
            with _disk(self._path):
                self._writer.close()

    def _flush(self) -> str | None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except Exception as error:  # protobuf of another major version raises TypeError
            self._usable = False
            return (
                f"no TensorBoard events: tensorboard cannot be imported ({type(error).__name__}: {error}); "
                "reinstall it with `pip install --force-reinstall tensorboard`"
            )
        with _disk(self._path):
            if self._writer is None:
                self._path.parent.mkdir(exist_ok=True)
                self._writer = RecordWriter(self._path.open("wb"))
                now = self._held[0][0]
                # START makes TensorBoard forget the steps from here on that an interrupted run has written.
                start = SessionLog(status=SessionLog.START)
                for event in (
                    Event(wall_time=now, file_version="brain.Event:2"),
                    Event(wall_time=now, step=self._first_step, session_log=start),
                ):
                    self._writer.write(event.SerializeToString())
            for wall_time, record in self._held:
                values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(record)]
                event = Event(wall_time=wall_time, step=record["step"], summary=Summary(value=values))
                self._writer.write(event.SerializeToString())
            self._writer.flush()
        self._held.clear()
        return None


def _event_file_name(directory: Path) -> str:
    """A name after those of all former starts: TensorBoard reads a run's files in the order of their names.

    A clock that was set back does not change that order.
    """
    stamps = [int(match[1]) for entry in directory.glob("*") if (match := _EVENT_FILE.match(entry.name))]
    stamp = max([int(time.time()), *(former + 1 for former in stamps)])
    return f"events.out.tfevents.{stamp}.{socket.gethostname()}.{os.getpid()}"


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every finite number of a record that is there in every step, by its column."""
    shown = {key: value for key, value in record.items() if key not in ("step", *OF_REPLAY)}
    for key, value in flat(shown).items():
        if value is not None and math.isfinite(value):
            yield key, float(value)
