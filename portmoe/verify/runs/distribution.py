"""Two runs whose steps rounding has made strangers, held together as distributions.

Every figure is taken of two runs, and of every two of the twins; allowed is a margin over what the twins show.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from portmoe.verify.runs.curves import Distance
from portmoe.verify.runs.quantities import Kind

Values = Sequence[float | None]
WINDOW = 10  # steps a value is smoothed over
MARGIN = 3.0  # over the largest that twins show: they are few, and there are many figures
FLOOR = {"loss": 0.02, "norm": 0.1, "layer": 0.1, "dropped": 0.005, "load": 0.005}


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


def figures(kind: Kind, found: Distance, twins: Sequence[Distance], begin: int) -> list[Figure]:
    """The figures of one quantity over its steps from ``begin`` on; none where those are too few.

    Losses and norms are compared by their logarithm, so figures are relative; shares by their difference.
    """
    if len(found.first) - begin < WINDOW:
        return []
    mine, others = _Apart.of(kind, found, begin), [_Apart.of(kind, pair, begin) for pair in twins]

    def figure(name: str, value: float, shown: Iterable[float]) -> Figure:
        return Figure(name, value, MARGIN * max(shown) + FLOOR[kind])

    near = [
        [max(pair.smoothed[max(0, i - WINDOW) : i + WINDOW + 1]) for pair in others]
        for i in range(len(mine.smoothed))
    ]
    smoothed = [figure("smoothed", value, shown) for value, shown in zip(mine.smoothed, near, strict=True)]
    return [
        figure("mean", mine.mean, (pair.mean for pair in others)),
        max(smoothed, key=lambda f: f.value / f.allowed),
        figure("final", mine.final, (pair.final for pair in others)),
    ]


@dataclass(frozen=True)
class _Apart:
    """How far one quantity of two runs is apart: on the whole, along the way, in the last quarter."""

    mean: float
    smoothed: list[float]
    final: float

    @classmethod
    def of(cls, kind: Kind, found: Distance, begin: int) -> "_Apart":
        a, b = (_scaled(kind, values[begin:]) for values in (found.first, found.second))
        last = max(WINDOW, len(a) // 4)
        return cls(
            _apart(fmean, a, b),
            [_apart(median, a[i : i + WINDOW], b[i : i + WINDOW]) for i in range(len(a) - WINDOW + 1)],
            _apart(fmean, a[-last:], b[-last:]),
        )


def _apart(figure: Callable[[Sequence[float]], float], a: Values, b: Values) -> float:
    """|figure(b) − figure(a)| over the steps where both have a number; 0 where none has: nothing is there to see."""
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not both:
        return 0.0
    first, second = zip(*both, strict=True)
    return abs(figure(second) - figure(first))


def _scaled(kind: Kind, values: Values) -> list[float | None]:
    if kind in ("dropped", "load"):
        return list(values)
    return [math.log(v) if v is not None and v > 0 else None for v in values]
