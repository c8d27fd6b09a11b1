"""Everything found about a machine and its backends."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from portmoe.record.origin import of_report
from portmoe.result import Result

# How the report shows a result's status.
LEVELS = {"pass": "OK", "warn": "WARN", "fail": "FAIL"}


@dataclass
class BackendReport:
    """Everything found about one backend.

    ``operations`` is the record of the choice of implementations, as in ``ops.json``.
    """

    name: str
    priority: int = 0
    facts: dict[str, str] = field(default_factory=dict)
    findings: list[Result] = field(default_factory=list)
    operations: dict[str, Any] = field(default_factory=dict)
    can_train: bool = True

    def block(self, finding: Result) -> None:
        """Add a finding that keeps the backend from training, whatever its level."""
        self.findings.append(finding)
        self.can_train = False


@dataclass
class Report:
    """Everything found on this machine.

    Attributes:
        asked: the name of a backend, or "auto" for all of them.
        backends: the one asked for, or all: those that can train first, in the order "auto" prefers them.
    """

    asked: str
    versions: dict[str, str]
    findings: list[Result] = field(default_factory=list)
    backends: list[BackendReport] = field(default_factory=list)

    @property
    def auto(self) -> str | None:
        """The backend that would be taken among those checked; None if none can train."""
        return next((backend.name for backend in self.backends if backend.can_train), None)

    @property
    def can_train(self) -> bool:
        """Whether the backend asked for can train; for "auto": whether any can."""
        return any(backend.can_train for backend in self.backends)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "asked": self.asked,
            "can_train": self.can_train,
            "auto": self.auto,
            "versions": self.versions,
            "provenance": of_report(),
            "checks": _as_dicts(self.findings),
            "backends": {
                backend.name: {
                    "can_train": backend.can_train,
                    "facts": backend.facts,
                    "checks": _as_dicts(backend.findings),
                    "operations": backend.operations,
                }
                for backend in self.backends
            },
        }


def _as_dicts(findings: Iterable[Result]) -> list[dict[str, Any]]:
    return [
        {"level": LEVELS[found.status], "check": found.name, "text": found.detail, "fix": found.fix}
        for found in findings
    ]
