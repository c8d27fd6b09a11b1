"""What the person at the terminal sees while a run goes on."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

from portmoe.record import rows
from portmoe.record.progress import Progress
from portmoe.record.terminal import terminal

ROW_EVERY = 5.0  # seconds between two rows of a terminal
HEADER_EVERY = 30  # rows


class Console:
    """A table of steps above one bar on a terminal, the same rows elsewhere; events as lines of their own.

    With ``style`` "full", the benchmark's line of every step instead of the rows.
    """

    def __init__(
        self,
        stream: TextIO,
        total_steps: int,
        *,
        first_step: int = 0,
        ranks: int = 1,
        style: Literal["table", "full"] = "table",
        plain_every: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            first_step: the first that will be shown.
            ranks: over which the tokens of a step are spread.
            plain_every: steps between two rows where ``stream`` is no terminal.
        """
        self._console = terminal(stream)
        self._progress = Progress(
            self._console, total_steps, first_step, unit="steps", plain_every=None, clock=clock
        )
        self._total = total_steps
        self._ranks = ranks
        self._full = style == "full"
        self._plain_every = plain_every
        self._clock = clock
        self._began = clock()
        self._row_at: float | None = None  # when the last row was shown
        self._rows = 0
        self._skipped: int | None = None if first_step else 0

    def begin(self) -> None:
        """Show the bar: from now on steps are made."""
        self._progress("first step")
        self._progress.__enter__()

    def step(self, record: Mapping[str, Any], line: str) -> None:
        """Show a finished step: the benchmark's ``line`` of it, or a row where one is due."""
        done = record["step"] + 1
        self._progress(_figures(record), done)
        if self._full:
            self._progress.say(line, wrap=False)
        elif self._due(done) or "valid_loss" in record:
            self._show(record)
        if not self._full:
            self._events(record)

    def note(self, text: str) -> None:
        """Show ``text``, which may have several lines, above the bar."""
        self._progress.say(text, "yellow" if text.startswith("WARNING") else "")

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def _due(self, done: int) -> bool:
        if self._row_at is None or done == self._total:
            return True
        if self._console.is_terminal:
            return self._clock() - self._row_at >= ROW_EVERY
        return done % self._plain_every == 0

    def _show(self, record: Mapping[str, Any]) -> None:
        self._row_at = self._clock()
        shown = rows.columns(self._console.width - 1 if self._console.is_terminal else 200)
        if self._rows == 0 or (self._console.is_terminal and self._rows % HEADER_EVERY == 0):
            self._progress.say(rows.header(shown), "bold")
        self._rows += 1
        speed = record.get("tgs/tgs_SMA")
        row = rows.Row(
            record,
            self._row_at - self._began,
            self._progress.seconds_left,
            None if speed is None else speed * self._ranks,
        )
        self._progress.say(rows.line(shown, row))

    def _events(self, record: Mapping[str, Any]) -> None:
        step, skipped = record["step"], record.get("inf_nan_skip_batches", 0)
        norm = rows.total_norm(record)
        before = self._skipped
        self._skipped = skipped
        if skipped > before if before is not None else norm is not None and not math.isfinite(norm):
            self._progress.say(
                f"step {step} skipped: its gradients are not finite ({skipped} so far)", "yellow"
            )
        if "valid_loss" in record:
            loss, accuracy = record["valid_loss"], record.get("valid_acc")
            told = "" if accuracy is None else f", accuracy {accuracy:.1%}"
            self._progress.say(f"validation after step {step}: loss {loss:.4f}{told}", "cyan")


def _figures(record: Mapping[str, Any]) -> str:
    loss = record.get("loss")
    return "" if loss is None else f"loss {loss:.4f}"
