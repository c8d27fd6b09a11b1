"""The report as text for a terminal."""

from collections.abc import Callable, Iterator, Sequence

from portmoe.accelerator.discovery import AUTO
from portmoe.result import Result
from portmoe.verify.machine.report import LEVELS, Report

Paint = Callable[[str, str], str]


def render(report: Report, paint: Paint = lambda level, tag: tag) -> str:
    """Return the whole report. ``paint`` may colour a finding's tag, as "[WARN]", by its level."""
    return "\n".join(_lines(report, paint))


def _lines(report: Report, paint: Paint) -> Iterator[str]:
    yield "portmoe {portmoe}, Python {python}, {system}".format(**report.versions)
    yield from _findings(report.findings, paint)
    for backend in report.backends:
        yield ""
        yield f"{backend.name}: {'can train' if backend.can_train else 'cannot train'} on this machine"
        if backend.facts and not any(finding.name == "device" for finding in backend.findings):
            yield "       found  " + "; ".join(f"{key}: {value}" for key, value in backend.facts.items())
        yield from _findings(backend.findings, paint)
    if report.asked == AUTO:
        yield ""
        if report.auto:
            yield f"`portmoe train` takes {report.auto}, unless --backend names another."
        else:
            yield "No backend can train on this machine."


def _findings(findings: Sequence[Result], paint: Paint) -> Iterator[str]:
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        level = LEVELS[finding.status]
        tag = f"[{level}]"
        yield f"{paint(level, tag)}{'':<{7 - len(tag)}}{finding.name:<{width}}  {finding.detail}"
        if finding.fix:
            yield f"{'':<{9 + width}}fix: {finding.fix}"
