"""The documents in files of text, read in parts, so that several processes share one large file.

A reader is a function from a part to pieces of documents; a format is a reader by the ending of its files.
"""

import codecs
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from portmoe.errors import ConfigError

PART = 4 << 20  # bytes of a file that one process takes at a time
PIECE = 1 << 16  # bytes of plain text that are tokenized at once


@dataclass(frozen=True)
class Part:
    """The lines of a file that begin in its bytes ``start`` to ``end``."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Piece:
    """Text of one document; ``ends``: nothing of the document follows."""

    text: str
    ends: bool


Reader = Callable[[Part], Iterator[Piece]]


def plain(part: Part) -> Iterator[Piece]:
    """A file of text is one document, cut at the ends of lines."""
    with _opened(part) as file:
        decode = codecs.getincrementaldecoder("utf-8")().decode
        try:
            for block in _blocks(file, part):
                yield Piece(decode(block), False)
            if part.end >= os.stat(part.path).st_size:
                yield Piece(decode(b"", final=True), True)
        except UnicodeDecodeError as error:
            raise _unreadable(part.path, f"is not UTF-8 ({error.reason}); save it as UTF-8") from error


def _blocks(file: BinaryIO, part: Part) -> Iterator[bytes]:
    """The lines that begin in the part, some at a time; a very long one is cut where it is."""
    block, inside = b"", False
    while (inside or file.tell() < part.end) and (line := file.readline(PIECE)):
        inside = not line.endswith(b"\n")
        block += line
        if len(block) >= PIECE:
            yield block
            block = b""
    yield block


def json_lines(part: Part) -> Iterator[Piece]:
    """A line is a document: ``{"text": "…"}``."""
    with _opened(part) as file:
        while (at := file.tell()) < part.end and (line := file.readline()):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8"))["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise _unreadable(part.path, f'has a line at byte {at} that is not {{"text": "…"}}')
            yield Piece(text, True)


READERS: Mapping[str, Reader] = {".txt": plain, ".md": plain, ".text": plain, ".jsonl": json_lines}


def read(part: Part) -> Iterator[Piece]:
    """The pieces of documents in ``part``, in order.

    Raises:
        ConfigError: the file cannot be read as what its ending says.
    """
    return READERS.get(part.path.suffix.lower(), plain)(part)


def files(given: Iterable[Path]) -> list[Path]:
    """The files given, and those of a known ending below the folders given, in the order of their names.

    Raises:
        ConfigError: one does not exist, or there is none.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise ConfigError(f"{str(path)!r} is neither a file nor a folder; name files of text")
    if not found:
        raise ConfigError(
            f"no file of text in {', '.join(map(str, given))}: those that end in {', '.join(READERS)} are "
            "read"
        )
    return list(dict.fromkeys(found))


def parts(path: Path) -> list[Part]:
    """A file in parts that together are the whole of it."""
    size = path.stat().st_size
    return [Part(path, start, min(start + PART, size)) for start in range(0, size, PART)]


def _opened(part: Part) -> BinaryIO:
    """The file, at the first line that begins in the part."""
    try:
        file = part.path.open("rb")
    except OSError as error:
        raise _unreadable(part.path, f"cannot be read ({error.strerror})") from error
    if part.start:
        file.seek(part.start - 1)
        file.readline()  # it began before
    return file


def _unreadable(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{str(path)!r} {what}")
