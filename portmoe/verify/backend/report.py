"""Everything found about one backend."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from portmoe.result import Result

# What report.json keeps of a check.
RECORDED = ("part", "subject", "name", "status", "detail", "needed", "allowed", "seconds", "compiling")
LEFT_OUT = "checked"  # the name of the check that stands for a group that was not made
PARTS = ("operations", "collectives", "memory", "training")


@dataclass
class Curve:
    """One quantity of the training run by step, beside its reference."""

    label: str
    reference: Sequence[float]
    measured: Sequence[float | None]


@dataclass
class Report:
    """Everything ``portmoe validate`` found about one backend.

    Attributes:
        provenance: as ``of_report`` gives it.
        warnings: what libraries warned of during the checks, and how often.
        interrupted: the group of checks that was running when it was; None: all were made.
    """

    backend: str
    device: str
    versions: dict[str, str]
    checks: list[Result] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    warnings: Mapping[str, int] = field(default_factory=dict)
    interrupted: str | None = None

    @property
    def failed(self) -> list[Result]:
        """The results that failed, in order."""
        return [check for check in self.checks if check.status == "fail"]

    @property
    def passed(self) -> bool:
        """Whether nothing failed, something was checked, and nothing was cut short."""
        checked = any(check.status == "pass" for check in self.checks)
        return not self.failed and checked and self.interrupted is None

    def of(self, part: str) -> Iterator[Result]:
        """The checks of one part, in order."""
        return (check for check in self.checks if check.part == part)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a tree."""
        return {
            "backend": self.backend,
            "device": self.device,
            "passed": self.passed,
            "versions": self.versions,
            "provenance": dict(self.provenance),
            "interrupted": self.interrupted,
            "warnings": dict(self.warnings),
            "checks": [{key: getattr(check, key) for key in RECORDED} for check in self.checks],
            "curves": [asdict(curve) for curve in self.curves],
        }
