"""How far a command is: how many of how many, what runs now and the time left, below all that is said.

Every command that takes longer than a moment shows itself by this.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from portmoe.record.terminal import terminal

WIDEST_BAR, NARROWEST_BAR = 30, 8  # characters
PLAIN_EVERY = 10.0  # seconds between two lines where nothing can be redrawn


class Progress:
    """While entered, one line that is redrawn on a terminal; elsewhere a plain line now and then.

    What is said stays, also where the command is interrupted, which is said too.

    Calling it tells what runs now: ``progress("attention", 3, 40)``.
    """

    def __init__(
        self,
        console: Console,
        total: int = 0,
        done: int = 0,
        unit: str = "",
        plain_every: float | None = PLAIN_EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            total: of what is counted; 0: not known yet.
            done: of them before this.
            unit: what is counted, as in "steps".
            plain_every: seconds between plain lines; None: none.
        """
        self.console = console
        self._total, self._done, self._unit = total, done, unit
        self._now = ""
        self._clock = clock
        self._plain_every = plain_every
        self._said_at = clock()
        self._marks = deque([(clock(), done)], maxlen=51)  # the last 50 that were done, and when
        self._live = Live(console=console, get_renderable=self._line, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if isinstance(error, KeyboardInterrupt):
            self.say(f"interrupted{f' after {self._count()}' if self._done else ''}; this is not a result")

    def __call__(self, now: str, done: int | None = None, total: int | None = None) -> None:
        """Show what runs ``now``, and how many of how many are done; None: as before."""
        self._now = now
        self._total = self._total if total is None else total
        if done is not None and done != self._done:
            self._done = done
            self._marks.append((self._clock(), done))
        if self.console.is_terminal or self._plain_every is None:
            return
        if self._clock() - self._said_at >= self._plain_every:
            self._said_at = self._clock()
            self.say(" ".join(filter(None, (self._count(), self._now, self._left()))))

    def say(self, text: str, style: str = "", wrap: bool = True) -> None:
        """Print ``text`` above the line, to stay; on a terminal it is wrapped between words, if it may be."""
        self.console.print(Text(text, style), soft_wrap=not (wrap and self.console.is_terminal))
        if self._live.is_started:
            self._live.refresh()

    def stop(self) -> None:
        """Take the line away. May be called again."""
        if self._live.is_started:
            self._live.stop()

    @property
    def seconds_left(self) -> float | None:
        """By the pace of the last 50; None: not known."""
        (began, first), (now, last) = self._marks[0], self._marks[-1]
        if last == first or not self._total:
            return None
        return max(self._total - self._done, 0) * (now - began) / (last - first)

    def _line(self) -> Table:
        """Count, time left, bar, what runs now: in this order of importance where the terminal is narrow."""
        count, left = self._count(), self._left()
        room = self.console.width - 1 - sum(cell_len(text) + 1 for text in (count, left) if text)
        cells: list[Text | ProgressBar] = [Text(count)] if count else []
        if self._total and room > NARROWEST_BAR:
            width = max(NARROWEST_BAR, min(room - cell_len(self._now) - 1, WIDEST_BAR))
            cells.append(ProgressBar(self._total, self._done, width=width))
            room -= width + 1
        cells += [Text(left, "cyan")] if left else []
        now = Text(self._now)
        now.truncate(max(room, 0), overflow="ellipsis")
        cells += [now] if now.plain else []
        line = Table.grid(*("" for _ in cells), padding=(0, 1, 0, 0))
        for column in line.columns:
            column.no_wrap = True
        line.add_row(*cells)
        return line

    def _count(self) -> str:
        if not self._total:
            return ""
        return f"{self._done:,}/{self._total:,} {self._unit}".strip()

    def _left(self) -> str:
        seconds = self.seconds_left
        return "" if seconds is None else f"{duration(seconds)} left"


@contextmanager
def told_when_due(unit: str, enabled: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what tells of something that may not happen: the line is there from the first call on.

    Args:
        enabled: false: calls are heard by nobody, as on all ranks but the first.
    """
    with ExitStack() as stack:
        shown: list[Progress] = []

        def told(now: str, done: int, total: int) -> None:
            if enabled and not shown:
                shown.append(stack.enter_context(Progress(terminal(sys.stderr), unit=unit)))
            for progress in shown:
                progress(now, done, total)

        yield told


def duration(seconds: float) -> str:
    """As "0:02:05"; days in front where it takes them."""
    return str(timedelta(seconds=round(seconds)))
