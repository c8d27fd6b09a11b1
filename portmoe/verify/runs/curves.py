"""How far two recorded runs are apart: losses, gradient norms, dropped tokens, step by step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Distance:
    """One quantity in both runs.

    Attributes:
        label: as in "loss" or "gradient norm, 1_fp32".
        first, second: the values by step; None where not finite.
        relative: |second − first| / |first| by step, infinite where only one is finite.
    """

    label: str
    first: Sequence[float | None]
    second: Sequence[float | None]
    relative: Sequence[float]

    @property
    def largest(self) -> float:
        return max(self.relative, default=0.0)

    def leaves(self, band: float, first: float | None = None) -> int | None:
        """Index of the first step beyond ``band``, or None; ``first``: the band of the first step."""
        bands = [band if first is None else first, *[band] * len(self.relative)]
        return next((i for i, r in enumerate(self.relative) if not r <= bands[i]), None)


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
    label: str, first: Sequence[float | None], second: Sequence[float | None], floor: float = 0.0
) -> Distance:
    """``floor``: a deviation counts relative to at least this, for values near zero."""
    return Distance(
        label, first, second, [_relative(a, b, floor) for a, b in zip(first, second, strict=True)]
    )


def loss_figures(loss: Distance) -> LossFigures:
    """Over the steps where both losses are finite."""
    pairs = [(a, b) for a, b in zip(loss.first, loss.second, strict=True) if a is not None and b is not None]
    if not pairs:
        return LossFigures(math.nan, math.nan, loss.largest, math.nan)
    first, second = zip(*pairs, strict=True)
    return LossFigures(fmean(first), fmean(second), loss.largest, pvariance([b - a for a, b in pairs]))


def group_norms(first: Sequence[Record], second: Sequence[Record]) -> Iterator[Distance]:
    """Per parameter group; layouts name the experts' group differently, so groups go by their place."""
    names = zip(_groups(first, "grad_norm"), _groups(second, "grad_norm"), strict=False)
    for a, b in names:
        label = a if a == b else f"{a} / {b}"
        yield distance(
            f"gradient norm, {label}",
            [record["grad_norm"][a] for record in first],
            [record["grad_norm"][b] for record in second],
        )


def layer_norms(first: Sequence[Record], second: Sequence[Record]) -> Iterator[Distance]:
    """Per parameter group and place in the model; none where a run did not record them.

    A place is judged against at least a thousandth of its group's whole norm.
    """
    names = zip(_groups(first, "grad_norm_layers"), _groups(second, "grad_norm_layers"), strict=False)
    for a, b in names:
        places = len(first[0]["grad_norm_layers"][a])
        floors = [record["grad_norm"][a] for record in first]
        floor = 1e-3 * min((f for f in floors if f is not None), default=0.0)
        for place in range(places):
            values = (
                [record["grad_norm_layers"][name][place] for record in run]
                for name, run in ((a, first), (b, second))
            )
            found = distance(f"gradient norm, {a}, {place_name(place, places)}", *values, floor)
            if any(found.first) or any(found.second):
                yield found


def place_name(place: int, places: int) -> str:
    """What an entry of ``grad_norm_layers`` stands for."""
    if place == 0:
        return "embedding"
    return "norm and head" if place == places - 1 else f"layer {place - 1}"


def _groups(run: Sequence[Record], key: str) -> list[str]:
    return list(run[0].get(key, ())) if run else []


def _relative(a: float | None, b: float | None, floor: float) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    if a == b:
        return 0.0
    scale = max(abs(a), floor)
    return abs(b - a) / scale if scale else math.inf
