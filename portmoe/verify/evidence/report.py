"""A verification as text, as JSON and as a page."""

from pathlib import Path

from portmoe.files import json_text, write_all
from portmoe.record import page
from portmoe.record.origin import of_report
from portmoe.result import Result
from portmoe.verify.evidence.verify import PARTS, Verification
from portmoe.verify.replay import report as replay_report

JSON, PAGE = "verify.json", "verify.html"
RECORDED = ("part", "subject", "name", "status", "detail")
LIMIT = (
    "whoever rewrites lines, checkpoints and chain alike is found only by computing steps again: "
    "--replay cpu, or another backend"
)
STATES = {"pass": "passed", "warn": "to look at", "fail": "failed", "skip": "not made"}
RULES = ("is ", "are ", "can ", "fits")  # how the names begin that say what holds
TAGS = {"pass": "PASS", "warn": "WARN", "fail": "FAIL", "skip": "SKIP"}


def verdict(found: Verification) -> str:
    """One line: whether anything contradicts that a run has written this, and what first."""
    if found.failed:
        first = found.failed[0]
        more = f", and {len(found.failed) - 1} more" if len(found.failed) > 1 else ""
        return f"this is not what a run has written: {first.subject}{more}"
    if found.replay is not None:
        steps = len(found.replay.recorded.starts)
        return f"nothing contradicts the record, and {steps} of its steps come out alike here"
    return "nothing contradicts the record"


def text(found: Verification) -> str:
    """Every result, what cannot be seen so, and the verdict last."""
    lines = [f"run  {found.path}", ""]
    lines += [f"[{TAGS[result.status]}] {result.part}: {_sentence(result)}" for result in found.results]
    note = [] if found.replay else [f"note: {LIMIT}"]
    return "\n".join([*lines, "", *note, verdict(found)])


def write(found: Verification, out: Path) -> None:
    """Write ``verify.json`` and ``verify.html`` into ``out``, which may not exist yet.

    Raises:
        OSError: they cannot be written.
    """
    record = {
        "passed": found.passed,
        "verdict": verdict(found),
        "run": str(found.path),
        "replayed": found.replay is not None,
        "provenance": of_report(),
        "results": [{key: getattr(result, key) for key in RECORDED} for result in found.results],
    }
    write_all(out, {JSON: json_text(record, indent=1, words=True) + "\n", PAGE: html(found)})


def html(found: Verification) -> str:
    """Return the page: what does not fit, then everything that was looked at."""
    columns = ("where", "what", "detail")
    counts = {status: sum(r.status == status for r in found.results) for status in TAGS}
    summary = [
        page.facts(
            [
                ("run", str(found.path)),
                (
                    "checks",
                    ", ".join(f"{number} {STATES[status]}" for status, number in counts.items() if number),
                ),
                ("replay", replay_report.verdict(found.replay) if found.replay else f"none: {LIMIT}"),
            ]
        ),
        *([page.table(columns, [_row(result) for result in found.failed])] if found.failed else []),
    ]
    sections = [
        page.Section(
            part.capitalize(), [page.table(columns, [_row(result) for result in results])], folded=True
        )
        for part in PARTS
        if (results := [result for result in found.results if result.part == part])
    ]
    status = "pass" if found.passed else "fail"
    return page.page("portmoe verify", status, page.sentence(verdict(found)), summary, sections, of_report())


def _sentence(result: Result) -> str:
    """What was looked at and found; the rule is left out where the detail says what breaks it."""
    if result.status == "fail" and result.detail and result.name.startswith(RULES):
        return f"{result.subject}: {result.detail}"
    return f"{result.subject} {result.name}{f': {result.detail}' if result.detail else ''}"


def _row(result: Result) -> tuple[str, tuple[str, ...]]:
    return result.status, (result.subject, result.name, result.detail)
