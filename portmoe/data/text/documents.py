"""The documents in files of text.

A reader is a function from a part to pieces of documents; a format is a reader by the ending of its files.
"""

import codecs
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from portmoe.data.text import records
from portmoe.data.text.parts import Part, opened, unreadable, where
from portmoe.errors import ConfigError

PIECE = 1 << 16  # bytes of plain text that are tokenized at once


@dataclass(frozen=True)
class Piece:
    """Text of one document, or what is wrong with it; ``ends``: nothing of the document follows.

    ``place`` is where the document begins, as ``records.Record`` has it.
    """

    text: str
    ends: bool
    place: int = 0
    problem: str = ""


Reader = Callable[[Part], Iterator[Piece]]


def plain(part: Part) -> Iterator[Piece]:
    """A file of text is one document, cut at the ends of lines."""
    with opened(part) as file:
        decode = codecs.getincrementaldecoder("utf-8")().decode
        try:
            for block in _blocks(file, part):
                yield Piece(decode(block), False, part.start)
            if part.end >= os.stat(part.path).st_size:
                yield Piece(decode(b"", final=True), True, part.start)
        except UnicodeDecodeError as error:
            raise unreadable(part.path, f"is not UTF-8 ({error.reason}); save it as UTF-8") from error


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


def objects(part: Part) -> Iterator[Piece]:
    """An object is a document: ``{"text": "…"}``."""
    for record in records.records(part):
        text = record.value.get("text") if record.value is not None else None
        if isinstance(text, str):
            yield Piece(text, True, record.place)
        else:
            yield Piece("", True, record.place, record.problem or 'it is not {"text": "…"}')


PLAIN: Mapping[str, Reader] = {".txt": plain, ".md": plain, ".text": plain}
# What folders of text hold: other .json files lie there too, and are read where they are named.
OF_FOLDERS = (*PLAIN, ".jsonl", ".parquet")
READERS: Mapping[str, Reader] = {**PLAIN, **dict.fromkeys(records.READERS, objects)}


def read(part: Part) -> Iterator[Piece]:
    """The pieces of documents in ``part``, in order.

    Raises:
        ConfigError: the file cannot be read as what its ending says.
    """
    return READERS.get(part.path.suffix.lower(), plain)(part)


def read_sound(part: Part) -> Iterator[Piece]:
    """The same where every document is sound.

    Raises:
        ConfigError: one is not.
    """
    for piece in read(part):
        if piece.problem:
            raise ConfigError(f"{where(part.path, piece.place)}: {piece.problem}")
        yield piece


def files(given: Iterable[Path], endings: Collection[str] = READERS) -> list[Path]:
    """The files given, and those with one of ``endings`` below the folders given, in order of their names.

    Raises:
        ConfigError: one does not exist, or there is none.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise ConfigError(f"{str(path)!r} is neither a file nor a folder; name files of text")
    if not found:
        raise ConfigError(
            f"no file of text in {', '.join(map(str, given))}: those that end in {', '.join(endings)} are "
            "read"
        )
    return list(dict.fromkeys(found))
