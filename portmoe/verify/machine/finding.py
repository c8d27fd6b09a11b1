"""One thing a check found, and all of them together."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. ``fix`` says what to do about a WARN or FAIL."""

    level: Level
    check: str
    text: str
    fix: str | None = None


@dataclass
class BackendReport:
    """Everything found about one backend.

    ``operations`` is the record of the choice of implementations, as in ``ops.json``.
    """

    name: str
    priority: int = 0
    facts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    operations: dict[str, Any] = field(default_factory=dict)
    can_train: bool = True

    def block(self, finding: Finding) -> None:
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
    findings: list[Finding] = field(default_factory=list)
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


def _as_dicts(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]
