"""The table a run is watched by: a row of figures for a step, as many columns as the terminal is wide."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from portmoe.record.progress import duration


@dataclass(frozen=True)
class Row:
    """A step's figures as they are shown.

    Attributes:
        record: of the step, see ``log_line.step_record``.
        seconds: since this process began with its first step.
        left: seconds to the end; None: not known.
        tokens_per_second: of all ranks together, over the last steps.
    """

    record: Mapping[str, Any]
    seconds: float
    left: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Column:
    """A column; those of a higher ``rank`` go first where the terminal is narrow."""

    name: str
    width: int
    rank: int
    text: Callable[[Row], str]


COLUMNS = (
    Column("step", 7, 0, lambda row: str(row.record["step"])),
    Column("loss", 8, 0, lambda row: _number(row.record.get("loss"), ".4f")),
    Column("grad norm", 9, 3, lambda row: _number(total_norm(row.record), "#.3g")),
    Column("lr", 8, 4, lambda row: _number(row.record.get("lr"), ".2e")),
    Column("tok/s", 9, 1, lambda row: _number(row.tokens_per_second, ",.0f")),
    Column("memory", 8, 5, lambda row: memory(row.record.get("peak_memory"))),
    Column("time", 8, 2, lambda row: duration(row.seconds)),
    Column("time left", 9, 0, lambda row: "" if row.left is None else duration(row.left)),
)


def columns(width: int) -> tuple[Column, ...]:
    """Return the columns that fit ``width`` characters."""
    for least in sorted({column.rank for column in COLUMNS}, reverse=True):
        fitting = tuple(column for column in COLUMNS if column.rank <= least)
        if sum(column.width + 1 for column in fitting) <= width + 1:
            return fitting
    return tuple(column for column in COLUMNS if not column.rank)


def header(shown: tuple[Column, ...]) -> str:
    """The names, as they stand above the figures."""
    return " ".join(f"{column.name:>{column.width}}" for column in shown).rstrip()


def line(shown: tuple[Column, ...], row: Row) -> str:
    """The figures of a step."""
    return " ".join(f"{column.text(row):>{column.width}}" for column in shown).rstrip()


def total_norm(record: Mapping[str, Any]) -> float | None:
    """The gradient norm over all parameter groups; None where the record has none."""
    groups = record.get("grad_norm")
    return math.hypot(*groups.values()) if groups else None


def memory(size: int | None) -> str:
    """Bytes in words."""
    if not size:
        return ""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
