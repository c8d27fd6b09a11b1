"""TensorBoard's events of a run."""

import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from portmoe.record.appended import disk
from portmoe.record.flat import flat
from portmoe.record.log_line import OF_REPLAY
from portmoe.record.rows import total_norm

FIRST = "0 overview"  # TensorBoard opens with the group whose name sorts first
_NO_CHART = ("step", "loss", "lr", "lr_next", "micro_num")
# Norms of groups that have no parameter in that place; windows that are not full yet.
_ZERO_IS_EMPTY = ("grad_norm_layers/", "tgs/last_tgs_10", "tgs/last_tgs_50")
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{1,18})\.")


class EventFile:
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
            with disk(self._path):
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
        with disk(self._path):
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
    """What a run is looked at for first, then every other number by its column; no charts without content."""
    first = {
        "loss": record.get("loss"),
        "lr": record.get("lr"),
        "grad_norm": total_norm(record),
        "tokens per second": record.get("tgs (tokens/gpu/second)"),
    }
    counts = {key: value for key, value in record.items() if key.startswith("tokens/")}
    absent = {key.partition("/")[2] for key, count in counts.items() if not count}
    shown = {key: value for key, value in record.items() if key not in (*_NO_CHART, *OF_REPLAY)}
    columns = {f"{FIRST}/{name}": value for name, value in first.items()} | flat(shown)
    for key, value in columns.items():
        empty = key.rpartition("/")[2] in absent or (not value and key.startswith(_ZERO_IS_EMPTY))
        if value is not None and math.isfinite(value) and not empty:
            yield key, float(value)
