"""How far two recorded runs are apart: losses, gradient norms, dropped tokens, step by step."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Any

from portmoe.record.flat import EMBEDDING, HEAD

Record = Mapping[str, Any]
GROUP_NORM, LAYER_NORM = "grad_norm/", "grad_norm_layers/"


@dataclass(frozen=True)
class Distance:
    """One quantity in both runs.

    Attributes:
        label: as in "loss" or "gradient norm, fp32".
        first, second: the values by step; None where not finite.
        relative: |second − first| / |first| by step, infinite where only one is finite, nan where neither is:
            nothing is compared there.
        excused: the steps, by index, where neither need be: skipped ones have no gradient norm.
    """

    label: str
    first: Sequence[float | None]
    second: Sequence[float | None]
    relative: Sequence[float]
    excused: frozenset[int] = frozenset()

    @property
    def largest(self) -> float:
        """The largest of the deviations that could be taken; nan where there is none."""
        return max((r for r in self.relative if not math.isnan(r)), default=math.nan)

    def leaves(self, bands: Sequence[float]) -> int | None:
        """Index of the first step beyond its band, or None.

        A step at which neither run has a number is beyond every band, unless it is excused; so is the first
        one where that holds for all.
        """
        if all(map(math.isnan, self.relative)):
            return 0
        beyond = (i for i, r in enumerate(self.relative) if not r <= bands[i])
        return next((i for i in beyond if not (math.isnan(self.relative[i]) and i in self.excused)), None)


@dataclass(frozen=True)
class LossFigures:
    """The benchmark's figure and those it is blind to.

    Attributes:
        mean_first, mean_second: over the common steps.
        largest: relative deviation.
        variance: of the difference, the benchmark's figure; 0 for any constant offset.
    """

    mean_first: float
    mean_second: float
    largest: float
    variance: float


def distance(
    label: str,
    first: Sequence[float | None],
    second: Sequence[float | None],
    floor: float = 0.0,
    excused: Iterable[int] = (),
) -> Distance:
    """``floor``: a deviation counts relative to at least this, for values near zero."""
    relative = [_relative(a, b, floor) for a, b in zip(first, second, strict=True)]
    return Distance(label, first, second, relative, frozenset(excused))


def loss_figures(loss: Distance) -> LossFigures:
    """Return the figures over the steps where both losses are finite."""
    pairs = [(a, b) for a, b in zip(loss.first, loss.second, strict=True) if a is not None and b is not None]
    if not pairs:
        return LossFigures(math.nan, math.nan, loss.largest, math.nan)
    first, second = zip(*pairs, strict=True)
    return LossFigures(fmean(first), fmean(second), loss.largest, pvariance([b - a for a, b in pairs]))


def group_norms(first: Sequence[Record], second: Sequence[Record]) -> Iterator[Distance]:
    """Yield the distance of the gradient norms per parameter group."""
    for column in _columns(first, second, GROUP_NORM):
        yield _norms(f"gradient norm, {column.removeprefix(GROUP_NORM)}", column, first, second)


def layer_norms(first: Sequence[Record], second: Sequence[Record]) -> Iterator[Distance]:
    """Yield the same per group and place in the model; nothing where a run did not record them.

    A place is judged against at least a thousandth of its group's whole norm.
    """
    if not all(_columns(run, run, LAYER_NORM) for run in (first, second)):
        return
    for column in _columns(first, second, LAYER_NORM):
        group, _, place = column.removeprefix(LAYER_NORM).partition("/")
        whole = [norm for record in first if (norm := record.get(f"{GROUP_NORM}{group}")) is not None]
        label = f"gradient norm, {group}, {place_name(place)}"
        found = _norms(label, column, first, second, 1e-3 * min(whole, default=0.0))
        if any(found.first) or any(found.second):
            yield found


def place_name(place: str) -> str:
    """What the last part of a column of ``grad_norm_layers`` stands for."""
    return {EMBEDDING: "embedding", HEAD: "norm and head"}.get(place, f"layer {place}")


def _columns(first: Sequence[Record], second: Sequence[Record], prefix: str) -> list[str]:
    """Those of either run, in order."""
    steps = (*first[:1], *second[:1])
    return list(dict.fromkeys(key for record in steps for key in record if key.startswith(prefix)))


def _norms(
    label: str, column: str, first: Sequence[Record], second: Sequence[Record], floor: float = 0.0
) -> Distance:
    """A step that both runs skipped has a loss and no norm."""
    runs = ([record.get(column) for record in run] for run in (first, second))
    pairs = enumerate(zip(first, second, strict=True))
    skipped = [i for i, pair in pairs if all(record["loss"] is not None for record in pair)]
    return distance(label, *runs, floor, skipped)


def _relative(a: float | None, b: float | None, floor: float) -> float:
    if a is None or b is None:
        return math.nan if a is b else math.inf
    if a == b:
        return 0.0
    scale = max(abs(a), floor)
    return abs(b - a) / scale if scale else math.inf
