"""Everything of two recorded runs that is compared step by step, with the kind of band it has."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from portmoe.verify.runs.curves import Distance, distance, group_norms, layer_norms
from portmoe.verify.runs.thresholds import Kind

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Quantity:
    """One quantity in two runs, and what kind of quantity it is."""

    kind: Kind
    distance: Distance

    @property
    def label(self) -> str:
        return self.distance.label


def quantities(a: Records, b: Records) -> Iterator[Quantity]:
    """Yield each quantity of two runs' records of the same steps; losses first."""
    for label, key in (("loss", "loss"), ("auxiliary loss", "moe_loss")):
        yield Quantity("loss", distance(label, column(a, key), column(b, key)))
    yield from _differences(a, b, "dropped_token_rate", "dropped", "dropped tokens, rate")
    yield from (Quantity("norm", found) for found in group_norms(a, b))
    yield from (Quantity("layer", found) for found in layer_norms(a, b))
    loads = [key for key in a[0] if key.startswith("expert_load/") and key in b[0]]
    for key in loads:
        yield from _differences(a, b, key, "load", f"load, expert {key.rpartition('/')[2]}")


def column(records: Records, key: str) -> list[float | None]:
    """One quantity by step."""
    return [record[key] for record in records]


def _differences(a: Records, b: Records, key: str, kind: Kind, label: str) -> Iterator[Quantity]:
    """Compare shares by their difference: near zero a quotient says nothing. A dense model has none."""
    shares = [column(run, key) for run in (a, b)]
    if any(share is not None for run in shares for share in run):
        apart = [_difference(x, y) for x, y in zip(*shares, strict=True)]
        yield Quantity(kind, Distance(label, *shares, apart))


def _difference(x: float | None, y: float | None) -> float:
    if x is None or y is None:
        return math.nan if x is y else math.inf
    return abs(y - x)
