"""A report as terminal table, JSON, JUnit XML and HTML."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from portmoe.errors import written_to
from portmoe.files import json_text, write_all
from portmoe.record import page, svg
from portmoe.record.bars import Bar, bars
from portmoe.result import Result
from portmoe.verify.backend.report import LEFT_OUT, PARTS, Report

COLUMNS = ("check", "needed", "allowed", "where")
MOST_DETAIL = 400  # characters of a detail in the table
_WORDS = {"pass": "passed", "fail": "failed", "skip": "not supported", "left": "left out"}


def write(report: Report, directory: Path) -> list[Path]:
    """Write ``report.json``, ``report.xml`` and ``report.html`` into ``directory``.

    Raises:
        ConfigError: the directory cannot be created or written.
    """
    contents = {
        "report.json": json_text(report.as_dict(), indent=1, words=True) + "\n",
        "report.xml": junit(report),
        "report.html": html(report),
    }
    with written_to(directory, "; give a directory that can"):
        return write_all(directory, contents)


def table(report: Report, style: Callable[[str, str], str] = lambda status, text: text) -> str:
    """A line for each subject (operations: and dtype) with its worst figures, and each failure in full.

    Args:
        style: colours a text by its status.
    """
    lines = []
    for part in PARTS:
        rows = _rows(report, part)
        width = max((len(label) for label, _ in rows), default=0)
        lines += ["", part] if rows else []
        for label, checks in rows:
            worst = max(checks, key=_badness)
            figures = f"needed {_number(worst.needed):>8} of {_number(worst.allowed):>8}"
            shown = figures if worst.needed is not None and worst.allowed else ""
            tag = style(worst.status, f"[{worst.status.upper():<4}]")
            lines.append(f"{tag} {label:<{width}}  {shown}".rstrip())
            for check in checks:
                if check.status == "fail" or (check is worst and check.status == "skip"):
                    lines.append(f"       {check.name}: {check.detail[:MOST_DETAIL]}")
    lines += ["", *_left_out(report), *warned(report), summary(report)]
    return "\n".join(lines).lstrip("\n")


def _rows(report: Report, part: str) -> list[tuple[str, list[Result]]]:
    """The checks of a part by the line of the table they share."""
    rows: dict[str, list[Result]] = {}
    for check in (check for check in report.of(part) if check.name != LEFT_OUT):
        kind, _, dtype = check.name.rpartition(", ") if part == "operations" else ("", "", check.name)
        rows.setdefault(f"{check.subject} {dtype}" if kind else f"{check.subject}: {check.name}", []).append(
            check
        )
    return list(rows.items())


def _badness(check: Result) -> tuple[int, float]:
    """Sorts a failure above a pass above a skip, then by the share of the tolerance."""
    share = check.needed / check.allowed if check.needed is not None and check.allowed else 0.0
    return ("skip", "pass", "fail").index(check.status), math.inf if math.isnan(share) else share


def summary(report: Report) -> str:
    """One line: how many checks went which way."""
    count = _counts(report.checks)
    compiling = sum(check.compiling for check in report.checks)
    compiled = f"; {compiling:.0f} s were spent compiling kernels" if compiling >= 1 else ""
    cut = f"; interrupted in {report.interrupted}" if report.interrupted else ""
    left_out = f", {count['left']} group{'s' if count['left'] != 1 else ''} left out" if count["left"] else ""
    return (
        f"{report.backend} ({report.device}): {count['pass']} checks passed, {count['fail']} failed, "
        f"{count['skip']} not supported{left_out}{compiled}{cut}"
    )


def _counts(checks: Sequence[Result]) -> dict[str, int]:
    """By status; "left": groups that were not made."""
    counts = Counter("left" if check.name == LEFT_OUT else check.status for check in checks)
    return {status: counts[status] for status in _WORDS}


def _left_out(report: Report) -> list[str]:
    """A line for each reason why groups were left out."""
    reasons: dict[str, list[str]] = {}
    for check in report.checks:
        if check.name == LEFT_OUT:
            reasons.setdefault(check.detail, []).append(check.subject)
    return [f"left out ({why}): {', '.join(groups)}" for why, groups in reasons.items()]


def warned(report: Report) -> list[str]:
    """A line for each warning of a library, with how often it came."""
    return [f"warned {times} times: {text[:MOST_DETAIL]}" for text, times in report.warnings.items()]


def what_next(report: Report) -> str:
    """The command that follows, by what was found."""
    if report.interrupted:
        return f"next: portmoe validate --backend {report.backend}, to the end"
    if not report.passed:
        subjects = list(
            dict.fromkeys(c.subject for c in report.failed if c.part == "operations" and "." in c.subject)
        )
        off = f"ops.disable: [{', '.join(subjects)}] switches off what failed; " if subjects else ""
        return f"next: {off}portmoe bisect --backend {report.backend}, which names the first one wrong"
    return f"next: portmoe bisect --backend {report.backend}"


def junit(report: Report) -> str:
    """A test suite per part, as continuous-integration servers read it."""
    root = ElementTree.Element("testsuites", name=f"portmoe validate {report.backend}")
    for part in PARTS:
        checks = list(report.of(part))
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=part,
            tests=str(len(checks)),
            failures=str(sum(check.status == "fail" for check in checks)),
            skipped=str(sum(check.status == "skip" for check in checks)),
            errors="0",
            time=f"{sum(check.seconds for check in checks):.3f}",
        )
        for check in checks:
            case = ElementTree.SubElement(
                suite, "testcase", classname=check.subject, name=check.name, time=f"{check.seconds:.3f}"
            )
            if check.status == "fail":
                ElementTree.SubElement(case, "failure", message=_figures(check)).text = _printable(
                    check.detail
                )
            elif check.status == "skip":
                ElementTree.SubElement(case, "skipped", message=_printable(check.detail))
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def html(report: Report) -> str:
    """One page with the failures, the share of every tolerance used, the training curves and the tables."""
    curves = [
        svg.lines(curve.label, [("recorded", curve.reference), (report.backend, curve.measured)])
        for curve in report.curves
    ]
    count = _counts(report.checks)
    passed = f"{count['pass']} of {count['pass'] + count['fail']}"
    stated = [("backend", report.backend), ("device", report.device), ("checks passed", passed)]
    stated += [("not supported, not checked", str(count["skip"])), *report.versions.items()]
    failures = [page.table(COLUMNS, [_html_row(c, to=True) for c in report.failed])]
    told = map(page.paragraph, (*_left_out(report), *warned(report)))
    summary = [page.facts(stated), *(failures if report.failed else []), *told]
    shares = _shares(report)
    used = [bars("share of the allowed tolerance, values", shares)] if shares else []
    sections = [
        page.Section("Tolerance used", used),
        page.Section("Training run", [page.plots(curves)] if curves else []),
        *(_html_part(part, list(report.of(part))) for part in PARTS),
    ]
    verdict = f"{report.backend} computes what the contracts say." if report.passed else _failure(report)
    status = "pass" if report.passed else "fail"
    return page.page("portmoe validate", status, verdict, summary, sections, report.provenance)


def _failure(report: Report) -> str:
    if report.interrupted and not report.failed:
        return f"Interrupted in {report.interrupted}; nothing before it failed."
    if not report.failed:
        return "Nothing could be checked."
    subjects = list(dict.fromkeys(check.subject for check in report.failed))
    more = f" and {len(subjects) - 1} more" if len(subjects) > 1 else ""
    return f"{subjects[0]}{more} failed."


def _html_part(part: str, checks: list[Result]) -> page.Section:
    count = _counts(checks)
    said = ", ".join(f"{n} {_WORDS[status]}" for status, n in count.items() if n)
    rows = [_html_row(check) for check in sorted(checks, key=_badness, reverse=True)]
    blocks = [page.table(COLUMNS, rows)] if rows else []
    return page.Section(part.capitalize(), blocks, folded=True, count=said)


def _shares(report: Report) -> dict[str, list[Bar]]:
    """By operation."""
    groups: dict[str, list[Bar]] = {}
    for check in report.of("operations"):
        if check.name.startswith("values") and check.needed is not None and check.allowed:
            share, label = check.needed / check.allowed, _label(check)
            bar = Bar(label, share, check.status, page.anchor(label))
            groups.setdefault(check.subject.partition(".")[0], []).append(bar)
    return groups


def _html_row(check: Result, to: bool = False) -> page.Row:
    """``to``: the line only leads to the one in its part's table."""
    label = _label(check)
    cells = (label, _number(check.needed), _number(check.allowed), check.detail[:MOST_DETAIL])
    name = page.anchor(label)
    return page.Row(check.status, cells, "" if to else name, name if to else "")


def _label(check: Result) -> str:
    return f"{check.subject}: {check.name}"


def _figures(check: Result) -> str:
    if check.needed is None:
        return "failed"
    return f"needed {_number(check.needed)}, allowed {_number(check.allowed)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _printable(text: str) -> str:
    """Without the control characters XML cannot hold."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
