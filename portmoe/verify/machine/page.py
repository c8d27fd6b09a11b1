"""The report on a machine as a page."""

from collections.abc import Sequence

from portmoe.accelerator.discovery import AUTO
from portmoe.record import page
from portmoe.record.origin import of_report
from portmoe.result import Result
from portmoe.verify.machine.report import BackendReport, Report

CHECKS = ("check", "found", "fix")
OPERATIONS = ("operation", "chosen", "the others")


def html(report: Report) -> str:
    """Return the page: what this machine can train on, what to repair, then each backend's checks."""
    decisive = next((b for b in report.backends if b.name == (report.auto or report.asked)), None)
    findings = [*report.findings, *(decisive.findings if decisive else ())]
    if not report.can_train and report.asked == AUTO:
        findings += [f for b in report.backends for f in b.findings if f.status == "fail"]
    repair = [f for f in findings if f.status in ("fail", "warn")]
    facts = [("trains on", report.auto or "no backend"), *_facts(decisive)]
    summary = [page.facts(facts), *([_checks(repair)] if repair else [])]
    machine = [page.facts(list(report.versions.items())), _checks(report.findings)]
    sections = [page.Section("This machine", machine, folded=True)]
    for backend in report.backends:
        state = "can train" if backend.can_train else "cannot train"
        chosen = [_operations(backend)] if backend.operations else []
        sections += [
            page.Section(backend.name, [_checks(backend.findings)], backend is not decisive, state),
            page.Section(f"{backend.name}: operations", chosen, folded=True),
        ]
    status = "pass" if report.can_train else "fail"
    return page.page("portmoe check-env", status, _verdict(report), summary, sections, of_report())


def _verdict(report: Report) -> str:
    if report.can_train:
        return f"This machine can train on {report.auto}."
    if report.asked == AUTO:
        return "No backend can train on this machine."
    return f"This machine cannot train on {report.asked}."


def _facts(backend: BackendReport | None) -> list[tuple[str, str]]:
    return list(backend.facts.items()) if backend else []


def _checks(findings: Sequence[Result]) -> str:
    return page.table(CHECKS, [page.Row(f.status, (f.name, f.detail, f.fix or "")) for f in findings])


def _operations(backend: BackendReport) -> str:
    rows = []
    for operation, record in backend.operations.items():
        others = [f"{c['name']}: {c['reason']}" for c in record["candidates"] if not c["chosen"]]
        rows.append(page.Row("", (operation, record["chosen"] or "none", "; ".join(others))))
    return page.table(OPERATIONS, rows)
