"""A chain of hashes over what a run writes, written with it: ``chain.jsonl``.

An entry for every start of the run (over config, environment and operations as they were then), for every
line of ``metrics.jsonl`` and for every checkpoint. Each entry's hash covers the one before, so that a line
that was edited, added or taken out later no longer fits. A run that goes on from a checkpoint adds to the
chain: what the steps made again replace stays in it. Whoever rewrites everything can write a chain that fits;
only computing steps again tells that.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from portmoe.files import json_text
from portmoe.record.appended import hand_over

CHAIN = "chain.jsonl"
FILES = ("config.yaml", "environment.json", "ops.json")
START, STEP, CHECKPOINT = "start", "step", "checkpoint"
_SEAL = ', "chain": "'


@dataclass(frozen=True)
class Entry:
    """One line of a chain.

    Attributes:
        number: of the line, from 1.
        content: what it says, without its hash.
        fits: its hash is that of its content and of the entry before.
    """

    number: int
    content: Mapping[str, Any]
    fits: bool


class Chain:
    """The chain of one run, as whoever writes the run's record adds to it. Any thread may.

    Raises (every method):
        OSError: the file cannot be read or written.
    """

    def __init__(self, directory: Path) -> None:
        """Go on from what is there; a line that a killed run did not write to its end is cut."""
        self._path = directory / CHAIN
        self._lock = Lock()
        self._last = ""
        whole = 0
        if self._path.exists():
            for line in self._path.read_bytes().splitlines(keepends=True):
                if (seal := _sealed(line)) is None:
                    break
                self._last = seal[1]
                whole += len(line)
            os.truncate(self._path, whole)

    def start(self, first_step: int, timestamp: str) -> None:
        """Note that the run starts, or goes on, with ``first_step``, and what the files say it is."""
        directory = self._path.parent
        files = {name: _file_hash(directory / name) for name in FILES}
        config = directory / FILES[0]
        text = config.read_text(encoding="utf-8") if config.exists() else ""
        self._add({"kind": START, "step": first_step, "time": timestamp, "files": files, "config": text})

    def step(self, step: int, line: str) -> None:
        """Note the line of ``metrics.jsonl`` that was written for ``step``."""
        self._add({"kind": STEP, "step": step, "sha256": hash_of(line.encode("utf-8", "backslashreplace"))})

    def checkpoint(self, step: int, state_file: Path) -> None:
        """Note a whole checkpoint, by the file that holds the checksums of the others."""
        self._add({"kind": CHECKPOINT, "step": step, "sha256": _file_hash(state_file)})

    def _add(self, entry: Mapping[str, Any]) -> None:
        with self._lock:
            text = json_text(entry)[:-1]
            self._last = _link(self._last, text)
            with self._path.open("ab", buffering=0) as file:
                hand_over(file, f'{text}{_SEAL}{self._last}"}}\n'.encode())


def read_chain(directory: Path) -> Iterator[Entry | None]:
    """The entries of a run's chain in order, None for a line that is none.

    Raises:
        OSError: there is no chain, or it cannot be read.
    """
    last = ""
    lines = (directory / CHAIN).read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if (seal := _sealed(line)) is None:
            yield None
            continue
        text, said = seal
        yield Entry(number, json.loads(text + "}"), _link(last, text) == said)
        last = said


def hash_of(content: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _sealed(line: bytes) -> tuple[str, str] | None:
    """An entry's text and its hash; None if the line is no entry written to its end."""
    try:
        text, seal, said = line.decode("utf-8").rpartition(_SEAL)
        json.loads(text + "}")
    except ValueError:
        return None
    return (text, said[:-3]) if seal and said.endswith('"}\n') else None


def _link(last: str, text: str) -> str:
    return hash_of(f"{last}{text}".encode())


def _file_hash(path: Path) -> str | None:
    return hash_of(path.read_bytes()) if path.exists() else None
