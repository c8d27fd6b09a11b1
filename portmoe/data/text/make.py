"""A folder of tokenized text, made by several processes, whole or not there, going on where it was stopped.

Each part of a file becomes a ``.bin`` with its ``.bin.meta`` in ``<folder>.partial``, which is renamed when
all are there: see ``sources.tokenized`` for the format.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portmoe.data.text.documents import OF_FOLDERS, files, read_sound
from portmoe.data.text.parts import Part, parts
from portmoe.data.text.tokenizer import Tokenizer, open_tokenizer
from portmoe.errors import ConfigError
from portmoe.files import json_text, write_whole

RECORD = "tokenized.json"
LONGEST = 8192  # tokens of a sample: what is longer becomes several, so that reading one stays cheap


@dataclass(frozen=True)
class Made:
    """What a folder holds.

    Attributes:
        already: parts that were there before.
        end: the token after each document; None: the tokenizer has none.
    """

    folder: str
    files: int
    samples: int
    tokens: int
    vocabulary: int
    end: int | None
    already: int


def make(
    given: Sequence[Path],
    tokenizer: str,
    folder: Path,
    jobs: int,
    progress: Callable[[str, int, int], None],
) -> Made:
    """Tokenize the files given into ``folder``.

    Args:
        tokenizer: see ``open_tokenizer``.
        progress: is told the file of the part that was made last, how many parts are made, and of how many.

    Raises:
        ConfigError: a file cannot be read, or the folder holds something else.
        BackendError: the tokenizer needs a package that is missing.
    """
    opened, found = open_tokenizer(tokenizer), files(given, OF_FOLDERS)
    source = {
        "tokenizer": opened.identity,
        "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in found],
    }
    if folder.exists():
        return _made_before(folder, source)
    partial = folder.with_name(f"{folder.name}.partial")
    work = [
        (part, partial / f"{number:05d}-{path.stem}-{index:05d}.bin")
        for number, path in enumerate(found)
        for index, part in enumerate(parts(path))
    ]
    try:
        _begin(partial, source)
        waiting = [(part, target) for part, target in work if not _meta_of(target).exists()]
        already = len(work) - len(waiting)
        for done, path in enumerate(_each(waiting, tokenizer, opened, jobs), already + 1):
            progress(path.name, done, len(work))
        counts = [_counts(target) for _, target in work]
        made = Made(
            folder=str(folder),
            files=len(found),
            samples=sum(samples for samples, _ in counts),
            tokens=sum(tokens for _, tokens in counts),
            vocabulary=opened.vocabulary,
            end=opened.end,
            already=already,
        )
        write_whole(partial / RECORD, json_text({"made": asdict(made), "source": source}, indent=1) + "\n")
        os.replace(partial, folder)
    except OSError as error:
        raise ConfigError(
            f"-o {str(folder)!r} cannot be written: {error.strerror}; give another folder"
        ) from error
    return made


def _each(waiting: Sequence[tuple[Part, Path]], name: str, tokenizer: Tokenizer, jobs: int) -> Iterator[Path]:
    """Make the parts; yields the file of each once it is made."""
    if min(jobs, len(waiting)) < 2:
        for part, target in waiting:
            write_part(part, target, tokenizer)
            yield part.path
        return
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    with ProcessPoolExecutor(min(jobs, len(waiting)), context, _open_here, (name,)) as pool:
        futures = {pool.submit(_write_here, part, target): part.path for part, target in waiting}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - set(others):
                process.terminate()  # a part takes seconds, and one that is not whole is made again
            raise


_here: list[Tokenizer] = []  # of a process of the pool


def _open_here(name: str) -> None:
    _here[:] = [open_tokenizer(name)]


def _write_here(part: Part, target: Path) -> None:
    write_part(part, target, _here[0])


def write_part(part: Part, target: Path, tokenizer: Tokenizer) -> None:
    """Write the samples of one part; its ``.meta`` comes last, and says that it is whole."""
    rows, offset = [], 0
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("wb") as file:
        for tokens in _samples(part, tokenizer):
            line = json.dumps({"tokens": tokens}, separators=(",", ":")).encode() + b"\n"
            file.write(line)
            rows.append((offset, len(tokens)))
            offset += len(line)
    os.replace(partial, target)
    with partial.open("wb") as file:
        np.lib.format.write_array(file, np.array(rows, dtype=np.int64).reshape(-1, 2), allow_pickle=False)
    os.replace(partial, _meta_of(target))


def _samples(part: Part, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Documents, or the parts of one that are at most ``LONGEST`` tokens long."""
    held: list[int] = []
    for piece in read_sound(part):
        held += tokenizer.encode(piece.text)
        if piece.ends and held and tokenizer.end is not None:
            held.append(tokenizer.end)
        while len(held) > LONGEST or (piece.ends and held):
            yield held[:LONGEST]
            held = held[LONGEST:]
    if held:
        yield held


def _begin(partial: Path, source: dict[str, Any]) -> None:
    """Make the folder of what is under way, or find it as an earlier start left it."""
    record = partial / RECORD
    if record.exists():
        if _source_of(record) != source:
            raise ConfigError(
                f"{str(partial)!r} holds an unfinished data set of other files or another tokenizer; remove "
                "it, or give another -o"
            )
        return
    partial.mkdir(parents=True, exist_ok=True)
    write_whole(record, json_text({"source": source}, indent=1) + "\n")


def _made_before(folder: Path, source: dict[str, Any]) -> Made:
    record = folder / RECORD
    if _source_of(record) != source:
        raise ConfigError(
            f"-o {str(folder)!r} exists and was not made from these files by this tokenizer; give another "
            "folder, or remove it"
        )
    return Made(**json.loads(record.read_text(encoding="utf-8"))["made"])


def _source_of(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding="utf-8")).get("source")
    except (OSError, ValueError, AttributeError):
        return None


def _counts(target: Path) -> tuple[int, int]:
    """Samples and tokens of a part that was made."""
    with _meta_of(target).open("rb") as file:
        rows = np.lib.format.read_array(file, allow_pickle=False)
    return len(rows), int(rows[:, 1].sum())


def _meta_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.meta")
