"""A comparison as text and as a page with plots."""

import math
from collections import Counter
from collections.abc import Sequence

from portmoe.record import page, svg
from portmoe.record.bars import Bar, bars
from portmoe.record.origin import of_report
from portmoe.verify.runs.comparison import Comparison, Judged


def verdict(found: Comparison) -> str:
    """One line: same mathematics or not, and from where."""
    if found.passed:
        return "the runs agree"
    apart = [j.distance.label for j in found.quantities if j.left_at == found.left_at]
    if "loss" in apart and found.loss_lost:
        return f"nothing was compared from step {found.left_at} on: the loss is no number in both runs"
    more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
    return f"the runs part at step {found.left_at}: {apart[0]}{more}"


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
    outside = [j for j in found.quantities if not j.passed]
    layers = [j for j in found.quantities if "layer" in j.distance.label]
    others = sorted((j for j in found.quantities if j not in layers), key=lambda j: j.passed)
    columns = ("quantity", "largest deviation", "allowed", "leaves the band at step")
    of_each = Counter(j.passed for j in found.quantities)
    summary = [
        page.facts(
            [
                ("first", found.first.name),
                ("second", found.second.name),
                ("steps in common", f"{len(found.steps)}: {found.steps[0]} … {found.steps[-1]}"),
                ("quantities within their band", f"{of_each[True]} of {len(found.quantities)}"),
                ("loss, largest relative deviation", f"{loss.largest:.2e}"),
                ("mean loss, first and second", f"{loss.mean_first:.6g} and {loss.mean_second:.6g}"),
                ("variance of the difference", f"{loss.variance:.2e}; a constant offset scores 0"),
            ]
        ),
        *([page.table(columns, [_row(j, to=True) for j in outside])] if outside else []),
        *map(page.paragraph, found.notes),
    ]
    curves = [plot for j in others for plot in _plots(j, names, found.steps[0])]
    sections = [
        page.Section("Curves", [page.plots(curves, pairs=True)]),
        page.Section("Layers", [bars("share of the allowed deviation", _shares(layers))] if layers else []),
        page.Section(
            "All quantities",
            [page.table(columns, [_row(j) for j in found.quantities])],
            folded=True,
            count=str(len(found.quantities)),
        ),
    ]
    status = "pass" if found.passed else "fail"
    return page.page("portmoe compare", status, _sentence(verdict(found)), summary, sections, of_report())


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _line(judged: Judged, width: int) -> str:
    tag = "[PASS]" if judged.passed else "[FAIL]"
    where = "" if judged.passed else f", leaves the band at step {judged.left_at}"
    largest = judged.distance.largest
    return f"{tag} {judged.distance.label:<{width}}  largest {largest:.2e}, allowed {judged.band:.0e}{where}"


def _row(judged: Judged, to: bool = False) -> page.Row:
    """``to``: the line only leads to the one among all."""
    left = "" if judged.left_at is None else str(judged.left_at)
    label = judged.distance.label
    cells = (label, f"{judged.distance.largest:.2e}", f"{judged.band:.0e}", left)
    name = page.anchor(label)
    return page.Row("pass" if judged.passed else "fail", cells, "" if to else name, name if to else "")


def _plots(judged: Judged, names: tuple[str, str], first: int) -> list[str]:
    found = judged.distance
    both = [(names[0], found.first), (names[1], found.second)]
    relative = [None if math.isnan(r) else r for r in found.relative]
    return [
        svg.lines(found.label, both, first=first),
        svg.lines(f"{found.label}: deviation", [("", relative)], limit=judged.band, log=True, first=first),
    ]


def _shares(judged: Sequence[Judged]) -> dict[str, list[Bar]]:
    """By parameter group; a quantity without any number in both runs is as far off as can be."""
    groups: dict[str, list[Bar]] = {}
    for j in judged:
        label, largest = j.distance.label, j.distance.largest
        share = math.inf if math.isnan(largest) else largest / j.band
        bar = Bar(label, share, "pass" if j.passed else "fail", page.anchor(label))
        groups.setdefault(label.rpartition(",")[0], []).append(bar)
    return groups
