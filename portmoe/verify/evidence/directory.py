"""A run directory as it lies there, and whether all of it can be read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portmoe.config import Config
from portmoe.config.read import load_config
from portmoe.errors import ConfigError
from portmoe.record.chain import CHAIN
from portmoe.record.flat import as_now
from portmoe.record.run_directory import CONFIG, ENVIRONMENT, OPERATIONS, STATES, STATUS, checkpoints_of
from portmoe.record.writers import LOG, METRICS
from portmoe.result import Result

NEEDED = (CONFIG, ENVIRONMENT, OPERATIONS, STATUS, METRICS, LOG, CHAIN)
PART = "files"


@dataclass(frozen=True)
class Line:
    """One line of ``metrics.jsonl``.

    Attributes:
        number: from 1.
        raw: as it lies there.
        record: its object; None where it is none.
    """

    number: int
    raw: bytes
    record: dict[str, Any] | None

    @property
    def place(self) -> str:
        """What reports call it."""
        return f"{METRICS}:{self.number}"


@dataclass(frozen=True)
class Directory:
    """What could be read of a run directory.

    Attributes:
        config: None where ``config.yaml`` cannot be read.
        environment: empty where ``environment.json`` cannot be read.
        state: of the run, as in "finished"; "" where it is not known.
        lines: of ``metrics.jsonl``, without one at the end that was not written to its end.
        torn: there was such a one.
        checkpoints: the folder that should hold them.
        results: what is missing or cannot be read.
    """

    path: Path
    config: Config | None
    environment: Mapping[str, Any]
    state: str
    lines: list[Line]
    torn: bool
    checkpoints: Path
    results: list[Result] = field(default_factory=list)

    @property
    def records(self) -> list[tuple[Line, dict[str, Any]]]:
        """The lines that hold a step, with it."""
        return [(line, line.record) for line in self.lines if line.record is not None]


def read_directory(path: Path) -> Directory:
    """Whatever of ``path`` can be read.

    Raises:
        ConfigError: it is no run directory at all.
    """
    missing = [name for name in NEEDED if not (path / name).is_file()]
    if not {CONFIG, METRICS} - set(missing):
        raise ConfigError(
            f"{str(path)!r} has neither {CONFIG} nor {METRICS}; give the directory of a run, as "
            "`portmoe train` left it"
        )
    results = [Result("fail", "is there", _why_missing(name), subject=name, part=PART) for name in missing]
    config = None
    try:
        config = load_config(path / CONFIG)
    except ConfigError as error:
        results.append(Result("fail", "can be read", str(error), subject=CONFIG, part=PART))
    trees = {name: _tree(path, name, results) for name in (ENVIRONMENT, OPERATIONS, STATUS)}
    state = trees[STATUS].get("state", "")
    if state not in STATES:
        detail = f"the state is {state!r}, which no run writes"
        results.append(Result("fail", "can be read", detail, subject=STATUS, part=PART))
    lines = list(_lines(path / METRICS)) if (path / METRICS).is_file() else []
    torn = bool(lines) and lines[-1].record is None and not lines[-1].raw.endswith(b"\n")
    results += _broken(lines[:-1] if torn else lines)
    if torn and state == "finished":
        detail = "it was not written to its end, and the run is finished"
        results.append(Result("fail", "is whole", detail, subject=lines[-1].place, part=PART))
    if not results:
        results.append(Result("pass", "are all there and can be read", subject="files", part=PART))
    folder = path / "checkpoints"
    if config is not None and not folder.is_dir():
        folder = checkpoints_of(path, config)
    lines = lines[:-1] if torn else lines
    return Directory(path, config, trees[ENVIRONMENT], state, lines, torn, folder, results)


def _why_missing(name: str) -> str:
    if name == CHAIN:
        return "it is missing: removed, or the run is of a version without one; no edit of a line can be told"
    return "it is missing"


def _tree(path: Path, name: str, results: list[Result]) -> dict[str, Any]:
    if not (path / name).is_file():
        return {}
    try:
        tree = json.loads((path / name).read_text(encoding="utf-8"))
        if isinstance(tree, dict):
            return tree
        detail = "it is no object"
    except (OSError, ValueError) as error:
        detail = str(error)
    results.append(Result("fail", "can be read", detail, subject=name, part=PART))
    return {}


def _lines(path: Path) -> Iterator[Line]:
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            record = json.loads(raw)
        except ValueError:
            record = None
        step = isinstance(record, dict) and isinstance(record.get("step"), int)
        yield Line(number, raw, as_now(record) if step and raw.endswith(b"\n") else None)


def _broken(lines: list[Line]) -> Iterator[Result]:
    for line in lines:
        if line.record is None:
            yield Result("fail", "can be read", "it is no step's object", subject=line.place, part=PART)
