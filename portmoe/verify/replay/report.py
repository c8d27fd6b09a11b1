"""A replay as text, as JSON and as a page."""

import shlex
from pathlib import Path

from portmoe.files import json_text, write_all
from portmoe.record import page
from portmoe.record.origin import of_report
from portmoe.record.run_directory import CONFIG
from portmoe.result import Result
from portmoe.verify.replay.replay import Replay

JSON, PAGE = "replay.json", "replay.html"
RECORDED = ("subject", "part", "name", "status", "detail", "needed", "allowed")


def verdict(found: Replay) -> str:
    """One line: whether the steps are the recorded ones, and what differs first."""
    steps = len(_by_step(found))
    if found.passed:
        return f"{steps} step{'s agree' if steps > 1 else ' agrees'} with the record"
    first = found.first
    if first is None:
        return "nothing was compared"
    return f"{first.subject} differs from the record, first in: {first.name} ({first.detail})"


def what_next(found: Replay) -> str:
    """The command that follows, by what was found."""
    run = shlex.quote(str(found.recorded.run.path))
    if found.passed:
        return f"next: portmoe report {run}"
    return f"next: portmoe bisect --backend {found.made.backend} --config {run}/{CONFIG}"


def text(found: Replay) -> str:
    """Every step, what differs in it, and the verdict last."""
    lines = [
        f"run     {found.recorded.run.name}, {found.recorded.run.config.model.dtype}",
        f"replay  {_made(found)}",
        "",
    ]
    for step, results in _by_step(found).items():
        failed = [result for result in results if result.status == "fail"]
        lines.append(f"[{'FAIL' if failed else 'PASS'}] {step}: {_closest(results)}")
        lines += [f"       {result.name}: {result.detail} ({_figures(result)})" for result in failed]
        skipped = [result for result in results if result.status == "skip"]
        lines += [f"       {result.name}: not compared, {result.detail}" for result in skipped]
    return "\n".join([*lines, "", verdict(found)])


def write(found: Replay, out: Path) -> None:
    """Write ``replay.json`` and ``replay.html`` into ``out``.

    Raises:
        OSError: they cannot be written.
    """
    record = {
        "passed": found.passed,
        "verdict": verdict(found),
        "run": str(found.recorded.run.path),
        "backend": found.made.backend,
        "ranks": found.made.ranks,
        "dtype": found.made.config.model.dtype,
        "provenance": of_report(),
        "steps": list(found.recorded.starts.values()),
        "results": [{key: getattr(result, key) for key in RECORDED} for result in found.results],
    }
    write_all(out, {JSON: json_text(record, indent=1, words=True) + "\n", PAGE: html(found)})


def html(found: Replay) -> str:
    """Return the page: what differs, and every quantity of every step beside its band."""
    steps = _by_step(found)
    columns = ("step", "quantity", "deviation", "allowed", "detail")
    run = found.recorded.run
    failed = [result for result in found.results if result.status == "fail"]
    summary = [
        page.facts(
            [
                ("recorded", f"{run.name}, {run.config.model.dtype}"),
                ("made again", _made(found)),
                ("checkpoints", ", ".join(map(str, found.recorded.starts))),
                ("quantities that agree", f"{_passed(found.results)} of {len(found.results)}"),
            ]
        ),
        *([page.table(columns, [_row(result) for result in failed])] if failed else []),
    ]
    sections = [
        page.Section(
            step.capitalize(),
            [page.table(columns, [_row(result) for result in results])],
            folded=True,
            count=_closest(results),
        )
        for step, results in steps.items()
    ]
    status = "pass" if found.passed else "fail"
    return page.page("portmoe replay", status, page.sentence(verdict(found)), summary, sections, of_report())


def _made(found: Replay) -> str:
    """What made the steps again."""
    ranks = f"{found.made.ranks} rank{'s' if found.made.ranks != 1 else ''}"
    return f"{found.made.backend}, {ranks}, {found.made.config.model.dtype}"


def _by_step(found: Replay) -> dict[str, list[Result]]:
    steps: dict[str, list[Result]] = {}
    for result in found.results:
        steps.setdefault(result.subject, []).append(result)
    return steps


def _closest(results: list[Result]) -> str:
    """How many quantities agree, and which of them needs most of its band."""
    measured = [r for r in results if r.status == "pass" and r.needed is not None and r.allowed]
    worst = max(measured, key=lambda r: r.needed / r.allowed, default=None)
    near = f", closest to its band: {worst.name}, {_figures(worst)}" if worst and worst.needed else ""
    near = "" if any(result.status == "fail" for result in results) else near
    return f"{_passed(results)} of {len(results)} quantities agree{near}"


def _passed(results: list[Result]) -> int:
    return sum(result.status == "pass" for result in results)


def _figures(result: Result) -> str:
    if result.needed is None:
        return "must be equal"
    return f"{result.needed:.1e}" + (f" of {result.allowed:.0e}" if result.allowed else "")


def _row(result: Result) -> tuple[str, tuple[str, ...]]:
    needed = "" if result.needed is None else f"{result.needed:.2e}"
    allowed = "" if result.allowed is None else f"{result.allowed:.0e}"
    return result.status, (result.subject, result.name, needed, allowed, result.detail)
