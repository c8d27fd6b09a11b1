"""The report as text for a terminal."""

from collections.abc import Callable, Iterator, Sequence

from portmoe.accelerator.discovery import AUTO
from portmoe.verify.machine.finding import Finding, Level, Report

Paint = Callable[[Level, str], str]


def render(report: Report, paint: Paint = lambda level, tag: tag) -> str:
    """The whole report. ``paint`` may colour a finding's tag, as "[WARN]", by its level."""
    return "\n".join(_lines(report, paint))


def _lines(report: Report, paint: Paint) -> Iterator[str]:
    yield "portmoe {portmoe}, Python {python}, {system}".format(**report.versions)
    yield from _findings(report.findings, paint)
    for backend in report.backends:
        yield ""
        yield f"{backend.name}: {'can train' if backend.can_train else 'cannot train'} on this machine"
        if backend.facts and not any(finding.check == "device" for finding in backend.findings):
            yield "       found  " + "; ".join(f"{key}: {value}" for key, value in backend.facts.items())
        yield from _findings(backend.findings, paint)
    if report.asked == AUTO:
        yield ""
        if report.auto:
            yield f"`portmoe train` takes {report.auto}, unless --backend names another."
        else:
            yield "No backend can train on this machine."


def _findings(findings: Sequence[Finding], paint: Paint) -> Iterator[str]:
    width = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        tag = f"[{finding.level}]"
        yield f"{paint(finding.level, tag)}{'':<{7 - len(tag)}}{finding.check:<{width}}  {finding.text}"
        if finding.fix:
            yield f"{'':<{9 + width}}fix: {finding.fix}"
