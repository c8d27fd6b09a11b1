"""An acceptance as text, as JSON and as one page."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from portmoe.errors import written_to
from portmoe.files import json_text, write_all
from portmoe.record import acceptance, page, svg
from portmoe.record.origin import of_report
from portmoe.result import Result
from portmoe.verify.acceptance.findings import Acceptance
from portmoe.verify.acceptance.speed import WARM_UP

JSON, HTML = "acceptance.json", "acceptance.html"
PARTS = ("loss", "config", "model", "batch", "data", "steps", "record")
COLUMNS = ("rule", "what was found")
KEPT = ("part", "name", "status", "detail", "fix")


def verdict(found: Acceptance) -> str:
    """One line."""
    if found.passed:
        return f"meets the rules of {found.benchmark}"
    first, *others = found.failed
    more = f", and {len(others)} more" if others else ""
    return f"does not meet the rules of {found.benchmark}: {first.name}{more}"


def text(found: Acceptance) -> str:
    """Rule by rule, the figures, and the verdict last."""
    lines = [f"run      {found.run.name}", f"against  {found.benchmark}", ""]
    for result in found.results:
        lines.append(f"[{result.status.upper():<4}] {result.part}: {result.name}: {result.detail}")
    lines += ["", *(f"{name:<28} {value}" for name, value in figures(found)), "", verdict(found)]
    return "\n".join(lines)


def figures(found: Acceptance) -> list[tuple[str, str]]:
    """Speed, memory, drops and load, with the window they are of."""
    w = found.window
    if w is None:
        return [("figures", "not recorded")]
    return [
        ("window", f"steps {w.first} … {w.last}; the first {WARM_UP} are left out"),
        ("TGS (tokens/gpu/second)", f"{w.tgs:,.1f}; median of the steps {w.tgs_median:,.1f}"),
        ("TFLOPS, benchmark's formula", f"{w.tflops:,.4g}: one expert a token, full attention"),
        ("TFLOPS, really computed", f"{w.model_tflops:,.4g}: all experts chosen, causal attention"),
        ("of the device's peak", "unknown" if w.mfu is None else f"{100 * w.mfu:.1f} %"),
        ("peak memory", f"{w.peak_memory / 2**30:,.2f} GiB"),
        ("dropped assignments", "none: a dense model" if w.dropped is None else f"{100 * w.dropped:.2f} %"),
        ("load by expert", ", ".join(f"{share:.3f}" for share in w.load[:64]) or "none"),
    ]


def as_dict(found: Acceptance) -> dict[str, Any]:
    """Return the acceptance as a tree, JSON-ready."""
    return {
        "benchmark": found.benchmark,
        "passed": found.passed,
        "verdict": verdict(found),
        "rules": [{key: getattr(result, key) for key in KEPT} for result in found.results],
        "figures": asdict(found.window) if found.window else None,
        "facts": found.facts,
        "losses": [[step["step"], step["loss"]] for step in found.run.steps],
        "provenance": dict(of_report()),
    }


def html(found: Acceptance) -> str:
    """The same on one page that needs no other file."""
    steps = found.run.steps
    losses = [step["loss"] for step in steps]
    first = steps[0]["step"]
    rates = [step.get("tgs (tokens/gpu/second)") for step in steps]
    curves = [
        svg.lines("loss", [("loss", losses)], limit=acceptance.LIMIT, log=True, first=first),
        svg.lines("tokens per device and second", [("tgs", rates)], first=first),
    ]
    decided = [r for r in found.results if r.status != "pass" or r.part == "loss"]
    summary = [page.facts([("run", found.run.name), *figures(found)]), page.table(COLUMNS, _rows(decided))]
    sections = [
        page.Section("Curves", [page.plots(curves, pairs=True)]),
        *(_part(part, [r for r in found.results if r.part == part]) for part in PARTS),
        *(
            page.Section(
                name.capitalize(), [page.facts([(k, _shown(v)) for k, v in facts.items()])], folded=True
            )
            for name, facts in found.facts.items()
            if facts
        ),
    ]
    said = verdict(found)
    status = "pass" if found.passed else "fail"
    return page.page("portmoe report", status, f"The run {said}.", summary, sections, of_report())


def write(found: Acceptance, folder: Path) -> list[Path]:
    """Write the page and the JSON into ``folder``.

    Raises:
        ConfigError: it cannot be written.
    """
    contents = {HTML: html(found), JSON: json_text(as_dict(found), indent=1, words=True) + "\n"}
    with written_to(folder, "; give a directory that can"):
        return write_all(folder, contents)


def _part(part: str, results: Sequence[Result]) -> page.Section:
    failed = sum(result.status == "fail" for result in results)
    count = f"{len(results)} rule{'s' if len(results) != 1 else ''}, {failed} failed"
    heading = {"record": "What was recorded", "config": "Keys that differ"}.get(part, part.capitalize())
    return page.Section(
        heading, [page.table(COLUMNS, _rows(results))] if results else [], folded=True, count=count
    )


def _rows(results: Sequence[Result]) -> list[page.Row]:
    return [page.Row(r.status, (r.name, f"{r.detail}{f'; {r.fix}' if r.fix else ''}")) for r in results]


def _shown(value: object) -> str:
    return "missing" if value in (None, "") else str(value)
