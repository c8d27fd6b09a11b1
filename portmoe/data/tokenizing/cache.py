"""The folder in the cache that holds what a recipe makes of files: made once, whole or not there.

One process makes it and the others, ranks on this machine and elsewhere, wait: the kernel's lock says who. On
a file system that cannot lock, several make the same parts, each of which is put in its place at once. What a
killed process leaves are whole parts, and the next one makes the others.
"""

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portmoe.cache import cache_folder
from portmoe.cores import usable_cores
from portmoe.data.text.parts import BLOCK, parts, unreadable
from portmoe.data.tokenizing.part import SHOWN, read_part, replaced, tokens_file
from portmoe.data.tokenizing.recipe import Given, Maker, Recipe, key_of
from portmoe.data.tokenizing.worker import Work, make_parts
from portmoe.errors import ConfigError
from portmoe.files import json_object, json_text

WHOLE, INDEX, LOCK = "whole.json", "index.npy", "lock"
ALONE, SHARED = "alone", "shared"  # who holds the lock, and who works where there is none
WAIT = 0.2  # seconds between two looks at what another process makes
EMPTY_FILE = "empty file"
Told = Callable[[str, int, int], None]  # what runs now, how many parts are made, of how many


def quiet(now: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Tokenized:
    """What was made of files.

    Attributes:
        index: a row a sample, int64: part, first token, tokens, first learned token, file, place.
        bad, notes: by kind, how many records were left out or are worth a word, and the first ones, each
            (number of the file, place, detail).
    """

    folder: Path
    index: np.ndarray
    records: int
    bad: dict[str, Any]
    notes: dict[str, Any]


def tokenized(recipe: Recipe, given: Sequence[Given], cache: str | None, told: Told = quiet) -> Tokenized:
    """What the recipe makes of the files: from the cache, made now, or waited for while another makes it.

    Args:
        cache: its folder; None: the user's.

    Raises:
        ConfigError: a file cannot be read, the tokenizer or the template cannot be used, or the cache given
            cannot be written.
        BackendError: a package is missing.
    """
    root = _root(cache)
    maker = Maker(recipe, [one.form for one in given])
    try:
        key = key_of(maker.identity, given, [_digest(one.path, root) for one in given])
        folder = root / key
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            if (found := _whole(folder)) is not None:
                return found
            with _locked(folder) as held:
                if held and (found := _whole(folder)) is None:
                    for left in folder.glob("*.partial") if held == ALONE else ():  # of killed processes
                        left.unlink(missing_ok=True)
                    found = _make(recipe, maker, given, folder, told)
            if found is not None:
                return found
            told("another process tokenizes", *_progress(folder))
            time.sleep(WAIT)
    except OSError as error:
        raise ConfigError(
            f"data.cache_folder={cache!r}: {error.filename or root} cannot be written ({error.strerror}); "
            "give a folder with room"
        ) from error


def _root(cache: str | None) -> Path:
    """Where the cache is: the user's, or, where that cannot be written, in the temporary folder."""
    if cache is not None:
        return Path(cache)
    with suppress(OSError):
        root = cache_folder() / "data"
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    return Path(tempfile.gettempdir(), f"portmoe-{os.getuid()}", "data")


def _make(recipe: Recipe, maker: Maker, given: Sequence[Given], folder: Path, told: Told) -> Tokenized:
    """Make the parts that are not there, and then what says that all are."""
    work: list[Work] = []
    files = []
    for number, one in enumerate(given):
        for part in parts(one.path):
            files.append(number)
            work.append((len(work), one, part))
    (folder / "parts").write_text(str(len(work)), encoding="utf-8")
    waiting = [item for item in work if read_part(folder, item[0]) is None]
    made = len(work) - len(waiting)

    def done(path: Path) -> None:
        nonlocal made
        made += 1
        told(path.name, made, len(work))

    make_parts(recipe, maker, waiting, folder, usable_cores(), done)
    _finish(folder, given, files)
    found = _whole(folder)
    if found is None:
        raise ConfigError(f"{str(folder)!r} was changed while it was made; start again")
    return found


def _finish(folder: Path, given: Sequence[Given], files: Sequence[int]) -> None:
    """Write the index over all parts, and last what says that it is there."""
    tables, records = [], Counter(dict.fromkeys(range(len(given)), 0))
    bad: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    for number, file in enumerate(files):
        found = read_part(folder, number)
        if found is None:
            raise ConfigError(f"{str(folder)!r} was changed while it was made; start again")
        rows, said = found
        same = np.full(len(rows), number), np.full(len(rows), file)
        tables.append(np.stack((same[0], rows[:, 0], rows[:, 1], rows[:, 2], same[1], rows[:, 3]), axis=1))
        records[file] += said["records"]
        for together, of_part in ((bad, said["bad"]), (notes, said["notes"])):
            for kind, entry in of_part.items():
                _add(together, kind, entry["count"], [(file, *rest) for rest in entry["first"]])
    for file, count in records.items():
        if not count:
            _add(bad, EMPTY_FILE, 1, [(file, 0, "it holds no sample")])
    index = np.concatenate(tables) if tables else np.empty((0, 6), dtype=np.int64)
    with replaced(folder / INDEX) as stream:
        np.lib.format.write_array(stream, index.astype(np.int64), allow_pickle=False)
    said = {"records": sum(records.values()), "samples": len(index), "bad": bad, "notes": notes}
    with replaced(folder / WHOLE) as stream:
        stream.write(json_text(said).encode())


def _add(together: dict[str, Any], kind: str, count: int, first: Sequence[tuple[Any, ...]]) -> None:
    entry = together.setdefault(kind, {"count": 0, "first": []})
    entry["count"] += count
    entry["first"] = [*entry["first"], *map(list, first)][:SHOWN]


def _whole(folder: Path) -> Tokenized | None:
    """What is there, if all of it is: a cache that something was removed from is made again."""
    said = json_object(folder / WHOLE)
    if not said:
        return None
    try:
        index = np.load(folder / INDEX, mmap_mode="r", allow_pickle=False)
        ends = np.zeros(int(index[:, 0].max(initial=-1)) + 1, dtype=np.int64)
        np.maximum.at(ends, index[:, 0], index[:, 1] + index[:, 2])
        sound = len(index) == said["samples"] and all(
            tokens_file(folder, number).stat().st_size == 4 * end for number, end in enumerate(ends.tolist())
        )
    except (OSError, ValueError, KeyError, IndexError):
        sound = False
    if sound:
        return Tokenized(folder, index, said["records"], said["bad"], said["notes"])
    with suppress(OSError):
        (folder / WHOLE).unlink()
    return None


def _progress(folder: Path) -> tuple[int, int]:
    """How many parts are made, and of how many, as far as that can be seen."""
    with suppress(OSError, ValueError):
        of = int((folder / "parts").read_text(encoding="utf-8"))
        return sum(1 for path in folder.glob("*.json") if path.name != WHOLE), of
    return 0, 0


@contextmanager
def _locked(folder: Path) -> Iterator[str]:
    """Whether this process may make what is not there: "" where another one does."""
    with (folder / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield ""
        except OSError:  # it cannot lock
            yield SHARED
        else:
            yield ALONE


def _digest(path: Path, root: Path) -> str:
    """The hash of a file's content, remembered by its place, size and time of change."""
    try:
        stat = path.stat()
        told = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
        memory = root / "digests" / hashlib.sha256(told.encode()).hexdigest()[:32]
        if known := json_object(memory).get("sha256"):
            return known
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, f"cannot be read ({error.strerror})") from error
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        with replaced(memory) as file:
            file.write(json_text({"sha256": digest.hexdigest()}).encode())
    return digest.hexdigest()
