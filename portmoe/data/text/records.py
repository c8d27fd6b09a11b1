"""The objects in files of JSON lines, JSON arrays and Parquet, each with its place."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from portmoe.data.text.parts import Part, is_array, items, opened, parquet, unreadable

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
BATCH = 1024  # rows of a Parquet file that are read at a time


@dataclass(frozen=True)
class Record:
    """One object; ``value`` is None where it is broken, and ``problem`` says how.

    ``place`` is the byte it begins at, in a Parquet file the number of its row.
    """

    place: int
    value: Mapping[str, Any] | None
    problem: str = ""


def _lines(part: Part) -> Iterator[Record]:
    with opened(part) as file:
        while (at := file.tell()) < part.end and (line := file.readline()):
            if line.strip():
                yield _parsed(at, line)


def _json(part: Part) -> Iterator[Record]:
    if not is_array(part.path):
        yield from _lines(part)
        return
    for at, item in items(part.path, part.start, part.end):
        yield _parsed(at, item)


def _parsed(at: int, text: bytes) -> Record:
    try:
        value = json.loads(text.decode("utf-8"))
        if _SURROGATE.search(text):  # halves of pairs are no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        return Record(at, None, f"it is not UTF-8 ({error.reason})")
    except (ValueError, RecursionError) as error:
        return Record(at, None, f"it is no JSON ({error!s:.100})")
    if not isinstance(value, dict):
        return Record(at, None, f"it is {type(value).__name__}, not an object")
    return Record(at, value)


def _parquet(part: Part) -> Iterator[Record]:
    file = parquet(part.path)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    ends = list(accumulate(sizes))
    groups = [g for g, end in enumerate(ends) if end > part.start and end - sizes[g] < part.end]
    at = ends[groups[0]] - sizes[groups[0]] if groups else 0
    try:
        for batch in file.iter_batches(batch_size=BATCH, row_groups=groups):
            first, last = max(part.start - at, 0), min(part.end - at, batch.num_rows)
            for place, row in enumerate(batch.slice(first, max(last - first, 0)).to_pylist(), at + first):
                yield Record(place, row)
            at += batch.num_rows
    except OSError as error:
        raise unreadable(part.path, f"is broken behind row {at} ({error!s:.200})") from error


READERS: Mapping[str, Callable[[Part], Iterator[Record]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".parquet": _parquet,
}


def records(part: Part) -> Iterator[Record]:
    """The objects that begin in ``part``, in order.

    Raises:
        ConfigError: the file cannot be read on from some place.
        BackendError: the package that reads it is missing.
    """
    return READERS[part.path.suffix.lower()](part)
