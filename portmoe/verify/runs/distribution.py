"""Two runs whose steps rounding has made strangers, held together as distributions.

Every figure is taken of two runs, and of every two of the twins; allowed is a margin over what twins show.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from portmoe.verify.runs.quantities import Quantity
from portmoe.verify.runs.thresholds import FAMILIES, Family, Kind
from portmoe.verify.runs.twins import Twins

Values = Sequence[float | None]
WINDOW = 10  # steps a value is smoothed over
FLOORS: Mapping[Family, float] = {"losses": 0.05, "norms": 0.1, "shares": 0.005}


@dataclass(frozen=True)
class Figure:
    """One figure of how far two runs' distributions are apart.

    Attributes:
        name: as in "smoothed".
        value: of the two runs; inf where a number is missing in one.
        allowed: what the twins show, times the margin.
    """

    name: str
    value: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.value <= self.allowed


def figures(quantity: Quantity, twins: Twins, begin: int) -> list[Figure]:
    """The figures of one quantity over its steps from ``begin`` on; none where steps or twins are too few.

    Losses and norms are compared by their logarithm, so figures are relative; shares by their difference.
    What one norm of the twins shows holds for all of them, and likewise of shares.
    """
    if len(quantity.distance.first) - begin < WINDOW or twins.margin is None:
        return []
    family = FAMILIES[quantity.kind]
    together = [
        _Apart.of(q, begin)
        for pair in twins.pairs
        for q in pair.values()
        if FAMILIES[q.kind] == family and (family != "losses" or q.label == quantity.label)
    ]
    mine = _Apart.of(quantity, begin)
    return [
        Figure(name, value, twins.margin * max(getattr(one, name) for one in together) + FLOORS[family])
        for name, value in vars(mine).items()
    ]


@dataclass(frozen=True)
class _Apart:
    """How far one quantity of two runs is apart: on the whole, along the way, in the last quarter."""

    mean: float
    smoothed: float
    final: float

    @classmethod
    def of(cls, quantity: Quantity, begin: int) -> "_Apart":
        found = quantity.distance
        a, b = (_scaled(quantity.kind, values[begin:]) for values in (found.first, found.second))
        last, windows = max(WINDOW, len(a) // 4), range(len(a) - WINDOW + 1)
        return cls(
            _apart(fmean, a, b),
            max(_apart(median, a[i : i + WINDOW], b[i : i + WINDOW]) for i in windows),
            _apart(fmean, a[-last:], b[-last:]),
        )


def _apart(figure: Callable[[Sequence[float]], float], a: Values, b: Values) -> float:
    """|figure(b) − figure(a)| over the steps where both have a number; 0 where none has."""
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not both:
        return 0.0
    first, second = zip(*both, strict=True)
    return abs(figure(second) - figure(first))


def _scaled(kind: Kind, values: Values) -> list[float | None]:
    if FAMILIES[kind] == "shares":
        return list(values)
    return [math.log(v) if v is not None and v > 0 else None for v in values]
