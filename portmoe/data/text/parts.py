"""A file in parts, so that several processes share one large file, and the place of a sample in words."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from portmoe.errors import BackendError, ConfigError

PART = 4 << 20  # bytes of a file that one process takes at a time
ROWS = 16384  # of a Parquet file, likewise: what lies before them in their group is read again
BLOCK = 1 << 20  # bytes that are read at a time
BOM = b"\xef\xbb\xbf"
_DECODER, _SPACE = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Part:
    """What begins in the bytes ``start`` to ``end`` of a file; of a Parquet file, the rows."""

    path: Path
    start: int
    end: int


def parts(path: Path) -> list[Part]:
    """A file in parts that together are the whole of it.

    Raises:
        ConfigError: it cannot be read as what its ending says.
    """
    if path.suffix.lower() == ".parquet":
        rows = parquet(path).metadata.num_rows
        return [Part(path, start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]
    try:
        if is_array(path):
            return list(_parts_of_array(path))
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, f"cannot be read ({error.strerror})") from error
    return [Part(path, start, min(start + PART, size)) for start in range(0, size, PART)]


def whole(path: Path) -> Part:
    """A file as one part, which is found without reading it."""
    try:
        is_parquet = path.suffix.lower() == ".parquet"
        return Part(path, 0, parquet(path).metadata.num_rows if is_parquet else path.stat().st_size)
    except OSError as error:
        raise unreadable(path, f"cannot be read ({error.strerror})") from error


def opened(part: Part) -> BinaryIO:
    """The file, at the first line that begins in the part."""
    try:
        file = part.path.open("rb")
    except OSError as error:
        raise unreadable(part.path, f"cannot be read ({error.strerror})") from error
    if part.start:
        file.seek(part.start - 1)
        file.readline()  # it began before
    elif file.read(len(BOM)) != BOM:
        file.seek(0)
    return file


def is_array(path: Path) -> bool:
    """Whether a ``.json`` file holds one array; if not, its lines are objects."""
    if path.suffix.lower() != ".json":
        return False
    with path.open("rb") as file:
        return file.read(BLOCK).removeprefix(BOM).lstrip()[:1] == b"["


def items(path: Path, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The elements of an array that begin in the bytes ``start`` to ``end``, each with its place.

    ``start`` is 0 or the place of an element. Reads as it goes; raises ``ConfigError`` where the array is
    broken, which nothing behind can be read of.
    """
    with path.open("rb") as file:
        file.seek(start)
        # A byte is a character of this encoding, and the signs of JSON are what they are in UTF-8.
        text, at, more, awaited = "", 0, True, "" if start else "["
        if start == 0 and file.read(len(BOM)) != BOM:
            file.seek(0)
        base = file.tell()
        while True:
            at = _SPACE.match(text, at).end()
            if at >= len(text) and more:
                base, text, at = base + at, file.read(BLOCK).decode("latin-1"), 0
                more = bool(text)
                continue
            found = text[at : at + 1]
            if awaited == "[":
                at, awaited = at + 1, ""
            elif found == "]" and awaited != "item":
                return
            elif awaited == ",":
                if found != ",":
                    raise _broken(path, base + at, "a comma or the array's end should follow")
                at, awaited = at + 1, "item"
            elif not found:
                raise _broken(path, base + at, "the array has no end")
            else:
                if base + at >= end:
                    return
                try:
                    _, stop = _DECODER.raw_decode(text, at)
                except (ValueError, RecursionError) as error:
                    block = file.read(max(BLOCK, len(text) - at)).decode("latin-1")
                    if block:
                        base, text, at = base + at, text[at:] + block, 0
                        continue
                    place = base + getattr(error, "pos", at)
                    raise _broken(path, place, f"{getattr(error, 'msg', error)!s:.80}") from error
                yield base + at, text[at:stop].encode("latin-1")
                at, awaited = stop, ","


def _parts_of_array(path: Path) -> Iterator[Part]:
    size = path.stat().st_size
    first = 0
    for place, _ in items(path, 0, size):
        if place - first >= PART:
            yield Part(path, first, place)
            first = place
    yield Part(path, first, size)


def where(path: Path, place: int) -> str:
    """The place of a sample in words: its line, or, in a Parquet file, its row, counted from 1."""
    if path.suffix.lower() == ".parquet":
        return f"row {place + 1} of {path}"
    lines, left = 1, place
    try:
        with path.open("rb") as file:
            while left and (block := file.read(min(left, BLOCK))):
                lines += block.count(b"\n")
                left -= len(block)
    except OSError:
        return f"byte {place} of {path}"
    return f"line {lines} of {path}"


def parquet(path: Path) -> Any:
    """A Parquet file, opened.

    Raises:
        BackendError: the package that reads it is missing.
        ConfigError: it is none.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise BackendError(
            f"{str(path)!r} needs the package pyarrow ({error}); pip install 'portmoe[finetune]', or save "
            "the data as JSON lines"
        ) from error
    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise unreadable(path, f"is no Parquet file that can be read ({error!s:.200})") from error


def unreadable(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{str(path)!r} {what}")


def _broken(path: Path, place: int, what: str) -> ConfigError:
    return ConfigError(f"{where(path, place)}: the JSON is broken: {what}")
