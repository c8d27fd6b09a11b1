"""What one check found, and all of them together."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["pass", "fail", "skip"]
PARTS = ("operations", "collectives", "memory", "training")


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        part: one of ``PARTS``.
        subject: what was checked, as in "attention.sdpa".
        name: how, as in "values, bfloat16".
        detail: where the largest deviation was, what went wrong, or why it was not checked.
        needed: the tolerance this would have needed, in the units of ``allowed``; None: nothing measured.
    """

    part: str
    subject: str
    name: str
    status: Status
    detail: str = ""
    needed: float | None = None
    allowed: float | None = None
    seconds: float = 0.0


@dataclass
class Curve:
    """One quantity of the training run by step, beside its reference."""

    label: str
    reference: Sequence[float]
    measured: Sequence[float | None]


@dataclass
class Report:
    """Everything ``portmoe validate`` found about one backend."""

    backend: str
    device: str
    versions: dict[str, str]
    checks: list[Check] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == "fail"]

    @property
    def passed(self) -> bool:
        """Nothing failed, and something was checked."""
        return not self.failed and any(check.status == "pass" for check in self.checks)

    def of(self, part: str) -> Iterator[Check]:
        """The checks of one part, in order."""
        return (check for check in self.checks if check.part == part)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types; infinities and NaN, which JSON does not have, as strings."""
        return {
            "backend": self.backend,
            "device": self.device,
            "passed": self.passed,
            "versions": self.versions,
            "checks": [_json_ready(asdict(check)) for check in self.checks],
            "curves": [_json_ready(asdict(curve)) for curve in self.curves],
        }


def _json_ready(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    return [_json_ready(item) for item in value] if isinstance(value, list) else value
