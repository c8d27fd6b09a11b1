"""A comparison as text and as a page with plots."""

import math
from collections.abc import Sequence

from portmoe.record import page

from portmoe.record import svg
from portmoe.verify.runs.comparison import Comparison, Judged


def verdict(found: Comparison) -> str:
    """One line: same mathematics or not, and from where."""
    if found.passed:
        return "the runs agree"
    apart = [j.distance.label for j in found.quantities if j.left_at == found.left_at]
    if "loss" in apart and found.loss_lost:
        return f"nothing was compared from step {found.left_at} on: the loss is no number in both runs"
    return f"the runs part at step {found.left_at}: {', '.join(apart)}"


def text(found: Comparison) -> str:
    """Figures, thresholds, and the verdict last."""
    loss = found.loss
    width = max(len(j.distance.label) for j in found.quantities)
    lines = [
        f"first   {found.first.name}",
        f"second  {found.second.name}",
        f"steps   {found.steps[0]} … {found.steps[-1]} ({len(found.steps)} in common)",
        f"loss    mean {loss.mean_first:.6g} and {loss.mean_second:.6g}, largest relative deviation "
        f"{loss.largest:.2e}, variance of the difference {loss.variance:.2e}",
        "        (the variance is the benchmark's figure; by it a constant offset scores 0)",
        "",
        *(_line(j, width) for j in found.quantities),
        "",
        *(f"note: {note}" for note in found.notes),
        verdict(found),
    ]
    return "\n".join(lines)


def html(found: Comparison) -> str:
    """The same on one page, with the curves of both runs and of their distance."""
    names = (found.first.backend, found.second.backend)
    if names[0] == names[1]:
        names = (found.first.path.name, found.second.path.name)
    loss = found.loss
    rows = [
        ("first", found.first.name, f"{loss.mean_first:.6g}"),
        ("second", found.second.name, f"{loss.mean_second:.6g}"),
    ]
    layers = [j for j in found.quantities if "layer" in j.distance.label]
    others = [j for j in found.quantities if "layer" not in j.distance.label]
    columns = ("quantity", "largest deviation", "allowed", "leaves the band at step")
    shares = "largest share of the allowed deviation"
    sections = [
        page.Section(
            "",
            [
                page.table(("run", "where", "mean loss"), [("", row) for row in rows]),
                page.paragraph(
                    f"{len(found.steps)} steps in common. Largest relative deviation of the loss "
                    f"{loss.largest:.2e}. Variance of the difference {loss.variance:.2e}: the benchmark's "
                    "figure, by which a constant offset scores 0."
                ),
                *map(page.paragraph, found.notes),
            ],
        ),
        page.Section("Quantities", [page.table(columns, [_row(j) for j in found.quantities])]),
        page.Section("Curves", [plot for j in others for plot in _plots(j, names)]),
        page.Section("Layers", [svg.bars(shares, _shares(layers))] if layers else []),
    ]
    return page.page("portmoe compare", verdict(found), found.passed, sections)


def _line(judged: Judged, width: int) -> str:
    tag = "[PASS]" if judged.passed else "[FAIL]"
    where = "" if judged.passed else f", leaves the band at step {judged.left_at}"
    largest = judged.distance.largest
    return f"{tag} {judged.distance.label:<{width}}  largest {largest:.2e}, allowed {judged.band:.0e}{where}"


def _row(judged: Judged) -> tuple[str, Sequence[str]]:
    left = "" if judged.left_at is None else str(judged.left_at)
    cells = (judged.distance.label, f"{judged.distance.largest:.2e}", f"{judged.band:.0e}", left)
    return "pass" if judged.passed else "fail", cells


def _plots(judged: Judged, names: tuple[str, str]) -> list[str]:
    found = judged.distance
    return [
        svg.lines(found.label, [(names[0], found.first), (names[1], found.second)]),
        svg.lines(f"{found.label}: deviation", [("", [None if math.isnan(r) else r for r in found.relative])], limit=judged.band, log=True),
    ]


def _shares(judged: Sequence[Judged]) -> list[tuple[str, float, bool]]:
    """A quantity without any number in both runs is as far off as can be."""
    largest = [math.inf if math.isnan(j.distance.largest) else j.distance.largest for j in judged]
    return [(j.distance.label, most / j.band, j.passed) for j, most in zip(judged, largest, strict=True)]
