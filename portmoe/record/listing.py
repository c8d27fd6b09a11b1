"""The runs there are, as ``portmoe runs`` lists them: what each directory says of itself."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from portmoe.config import yaml as config_yaml
from portmoe.files import json_object
from portmoe.record.lock import in_use
from portmoe.record.run_directory import CONFIG, ENVIRONMENT, STATUS
from portmoe.record.writers import METRICS, last_record

COLUMNS = ("run", "state", "steps", "loss", "backend", "when")


@dataclass(frozen=True)
class Listed:
    """One run.

    Attributes:
        state: as in status.json; "killed" where that says "running" and nothing runs; "unknown" without one.
        steps: made, and to be made; None: not known.
        when: its newest record, or its start where it has none.
    """

    path: Path
    state: str
    steps: int
    total_steps: int | None
    loss: float | None
    backend: str
    when: datetime


def listed(folders: Iterable[Path]) -> list[Listed]:
    """Every run that is one of ``folders`` or lies in one, the newest first; links are not followed."""
    found = {}
    for folder in folders:
        for path in (folder, *_below(folder)):
            if (path / CONFIG).is_file():
                found[path] = _read(path)
    return sorted(found.values(), key=lambda run: run.when, reverse=True)


def table(runs: Sequence[Listed]) -> list[str]:
    """A line for each, under the names of the columns."""
    rows = [COLUMNS, *map(_cells, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cells(run: Listed) -> tuple[str, ...]:
    total = "?" if run.total_steps is None else str(run.total_steps)
    loss = "" if run.loss is None else f"{run.loss:.4f}"
    return str(run.path), run.state, f"{run.steps}/{total}", loss, run.backend, f"{run.when:%Y-%m-%d %H:%M}"


def _below(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _read(path: Path) -> Listed:
    state = str(json_object(path / STATUS).get("state", "unknown"))
    if state == "running" and not in_use(path):
        state = "killed"
    last = last_record(path / METRICS)
    touched = path / METRICS if (path / METRICS).is_file() else path / CONFIG
    return Listed(
        path,
        state,
        last["step"] + 1 if last else 0,
        _total_steps(path / CONFIG),
        last.get("loss") if last else None,
        str(json_object(path / ENVIRONMENT).get("backend", "?")),
        datetime.fromtimestamp(touched.stat().st_mtime),
    )


def _total_steps(path: Path) -> int | None:
    """As the config says, which may be of another version and need not be valid in this one."""
    try:
        return config_yaml.parse(path.read_text(encoding="utf-8"))["data"]["total_steps"]
    except (OSError, ValueError, KeyError, TypeError, config_yaml.YamlError):
        return None
