"""What the person at the terminal sees while a run goes on."""

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TextIO

BAR_WIDTH = 20
ERASE_LINE = "\r\x1b[K"


class Console:
    """Output: on a terminal one progress line, redrawn under the notes; elsewhere plain lines, one a step.

    A reader that goes away (``portmoe train | head``, a closed terminal) ends the output, not the run.
    """

    def __init__(
        self,
        stream: TextIO,
        terminal: bool,
        total_steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._terminal = terminal
        self._total_steps = total_steps
        self._clock = clock
        self._ends = deque([clock()], maxlen=51)  # when the last 50 steps ended
        self._progress = ""
        self._open = True

    def step(self, record: Mapping[str, Any], line: str) -> None:
        """Show a finished step: ``line`` as it is, or the progress line made from ``record``."""
        self._ends.append(self._clock())
        if self._terminal:
            self._progress = self._progress_line(record)
            self._write(ERASE_LINE + self._progress)
        else:
            self._write(line + "\n")

    def note(self, text: str) -> None:
        """Show ``text``, which may have several lines, above the progress line."""
        if self._terminal and self._progress:
            self._write(f"{ERASE_LINE}{text}\n{self._progress}")
        else:
            self._write(text + "\n")

    def close(self) -> None:
        """Leave the last progress line standing; what is shown later begins on a new line."""
        if self._progress:
            self._write("\n")
            self._progress = ""

    def _progress_line(self, record: Mapping[str, Any]) -> str:
        done = record["step"] + 1
        filled = BAR_WIDTH * done // self._total_steps
        seconds_per_step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        eta = timedelta(seconds=round((self._total_steps - done) * seconds_per_step))
        line = (
            f"[{'=' * filled}{' ' * (BAR_WIDTH - filled)}] step {done}/{self._total_steps}  "
            f"loss {record['loss']:.4f}  tgs {record['tgs/tgs_SMA']:.0f}  ETA {eta}"
        )
        # A line wider than the terminal would wrap, and only its last row would be redrawn.
        return line[: shutil.get_terminal_size().columns - 1]

    def _write(self, text: str) -> None:
        if not self._open:
            return
        encoding = self._stream.encoding or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
            self._stream.flush()
        except OSError:
            self._open = False
            # Python flushes the stream again at exit and would complain then.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
