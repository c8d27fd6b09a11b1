"""The terminal, or what stands in its place: one rich console over a stream that may be anything.

What is piped, a dumb terminal (TERM) and continuous integration (CI) get plain lines: no colour, nothing
redrawn. NO_COLOR takes the colours alone.
"""

import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def terminal(stream: TextIO | None = None) -> "Console":
    """Return a console on ``stream``, standard output if None.

    It prints text as it is, without markup. Its ``is_terminal`` says whether lines can be redrawn.
    """
    from rich.console import Console  # takes a tenth of a second to import

    stream = stream or sys.stdout
    lively = redraws(stream)
    return Console(
        file=Lenient(stream),
        force_terminal=lively,
        color_system="auto" if coloured(stream) else None,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=not lively,
    )


def redraws(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal on which a line can be written again."""
    dumb = os.environ.get("TERM", "") in ("", "dumb", "unknown")
    return stream.isatty() and not dumb and not os.environ.get("CI")


def coloured(stream: TextIO) -> bool:
    """Whether colours are wanted on ``stream``."""
    return redraws(stream) and not os.environ.get("NO_COLOR")


class Lenient:
    """A text stream that never fails its writer.

    What its encoding lacks becomes "?". A reader that goes away (``portmoe train | head``, a closed terminal)
    ends the output, not the run.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._open = True
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write ``text``; returns its length."""
        self._try(self._stream.write, text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor."""
        return self._stream.fileno()

    def _try(self, function, *arguments: str) -> None:  # noqa: ANN001 (a bound method of any stream)
        if not self._open:
            return
        try:
            function(*arguments)
        except OSError:
            self._open = False
            # Python flushes the stream again at exit and would complain then.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
