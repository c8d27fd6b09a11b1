"""What is made of one part of a file: tokens in one file, rows about its samples, and what is to be said.

A token is four bytes, its highest bit set where it is learned. A row of a sample is (first token, tokens,
first learned token that can be a label or the number of tokens, place in the source file).
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from portmoe.data.text.parts import Part
from portmoe.data.tokenizing.recipe import Given, Maker
from portmoe.files import json_text, sync

LEARNED = np.uint32(1 << 31)
TOKEN = np.uint32((1 << 31) - 1)
SHOWN = 5  # of a kind
UNLEARNED = "no token to learn"


def tokens_file(folder: Path, number: int) -> Path:
    """The tokens of a part."""
    return folder / f"{number:06d}.tokens"


def rows_file(folder: Path, number: int) -> Path:
    """The rows of a part."""
    return folder / f"{number:06d}.npy"


def said_file(folder: Path, number: int) -> Path:
    """What is to be said of a part; written last, it says that the part is whole."""
    return folder / f"{number:06d}.json"


def write_part(maker: Maker, given: Given, part: Part, folder: Path, number: int) -> None:
    """Make part ``number``. Others may make it too, at the same time: each file is replaced at once."""
    rows, said = [], {"records": 0, "bad": {}, "notes": {}}
    at = 0
    with replaced(tokens_file(folder, number)) as file:
        for made in maker.samples(given, part):
            said["records"] += 1
            for kind, detail in made.notes.items():
                _count(said["notes"], kind, made.place, detail)
            bad, encoded = made.bad, made.encoded
            if encoded is not None and not encoded.learned_T[1:].any():
                bad, encoded = (UNLEARNED, "no token of it is learned, by data.train_on"), None
            if encoded is None:
                _count(said["bad"], bad[0], made.place, bad[1])
                continue
            words_T = encoded.tokens_T.astype(np.uint32) | np.where(encoded.learned_T, LEARNED, np.uint32(0))
            file.write(words_T.astype("<u4").tobytes())
            rows.append((at, len(words_T), 1 + int(encoded.learned_T[1:].argmax()), made.place))
            at += len(words_T)
    with replaced(rows_file(folder, number)) as file:
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        np.lib.format.write_array(file, table, allow_pickle=False)
    with replaced(said_file(folder, number)) as file:
        file.write(json_text(said).encode())


def read_part(folder: Path, number: int) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Rows and what is to be said of a part; None where it is not there, or not whole."""
    try:
        said = json.loads(said_file(folder, number).read_text(encoding="utf-8"))
        with rows_file(folder, number).open("rb") as file:
            rows = np.lib.format.read_array(file, allow_pickle=False)
        tokens = tokens_file(folder, number).stat().st_size
    except (OSError, ValueError):
        return None
    return (rows, said) if rows[:, 1].sum() * 4 == tokens else None


def _count(counted: dict[str, Any], kind: str, place: int, detail: str) -> None:
    """One more of a kind; the first ones are kept with their places."""
    entry = counted.setdefault(kind, {"count": 0, "first": []})
    entry["count"] += 1
    if len(entry["first"]) < SHOWN:
        entry["first"].append([place, detail])


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that this process alone writes beside its place, put there at once when all is written."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
