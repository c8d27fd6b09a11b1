"""A comparison as text and as a page with plots."""

import math
from collections import Counter
from collections.abc import Sequence

from portmoe.record import acceptance, page, svg
from portmoe.record.bars import Bar, bars
from portmoe.record.origin import of_report
from portmoe.record.run_directory import CONFIG
from portmoe.verify.runs.comparison import Comparison, Judged
from portmoe.verify.runs.distribution import Figure
from portmoe.verify.runs.recorded import Run

UNSEEN = "unseen"
COLUMNS = ("quantity", "largest deviation", "allowed", "leaves the band at step", "later steps")


def verdict(found: Comparison) -> str:
    """One line: same mathematics or not, from where, and as far as what was judged."""
    if found.passed:
        unjudged = len(found.steps) - found.until
        if found.identical:
            return f"the runs agree: their figures are the same in all {len(found.steps)} steps"
        if found.judged_later or not unjudged:
            return "the runs agree"
        return f"the runs agree in the steps that could be judged, {found.until} of {len(found.steps)}"
    if found.left_at is None:
        return f"the runs are not the same run: {'; '.join(_later_failures(found))}"
    apart = [j.distance.label for j in found.quantities if j.left_at == found.left_at]
    if "loss" in apart and found.loss_lost:
        return f"nothing was compared from step {found.left_at} on: the loss is no number in both runs"
    more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
    return f"the runs part at step {found.left_at}: {apart[0]}{more}"


def _later_failures(found: Comparison) -> list[str]:
    failed = [(j, f) for j in found.quantities for f in j.later if not f.passed]
    said = [
        f"{f.name} {j.distance.label} {f.value:.2g} apart, {f.allowed:.2g} allowed" for j, f in failed[:3]
    ]
    said += [f"and {len(failed) - 3} more"] if len(failed) > 3 else []
    if found.acceptance_differs:
        passes, fails = ("first", "second") if found.accepted[0] else ("second", "first")
        said.append(f"the {passes} meets the acceptance, the {fails} does not, and every twin does")
    return said


def judged_how(found: Comparison) -> list[tuple[str, str]]:
    """Which part was judged how, by what, and what could not be seen; names and texts."""
    steps, until, twins = found.steps, found.until, found.twins
    if found.identical and twins is None:
        return [("twins", "none, and none needed"), ("judged", f"steps {steps[0]} … {steps[-1]}: all equal")]
    one_by_one = f"steps {steps[0]} … {steps[until - 1]} one by one" if until else "no step one by one"
    if twins is None:
        rest = f"; steps {steps[until]} … {steps[-1]} are not judged" if until < len(steps) else ""
        ways = [
            ("twins", "none, so only what comes before rounding can have grown is judged"),
            ("judged", one_by_one + rest),
        ]
        if rest:
            ways.append((UNSEEN, f"everything from step {steps[until]} on. {_how_to_twin(found.first)}"))
        return ways
    growth = (
        "rounding shows nowhere in the loss"
        if twins.growth is None
        else f"rounding grows {twins.growth:.1f}-fold a step"
    )
    strangers = (
        f"from step {steps[until]} on two right runs are strangers"
        if until < len(steps)
        else "no step makes two right runs strangers"
    )
    names = ", ".join(str(run.path) for run in twins.runs)
    ways = [("twins", f"{names}: {growth}; {strangers}")]
    rest = f"steps {steps[until]} … {steps[-1]}" if until < len(steps) else ""
    later = found.quantities[0].later
    if until == len(steps):
        return [*ways, ("judged", f"{one_by_one}, by bands that follow the twins")]
    if not later:
        too_little = "too few steps" if found.twins.margin else "a single twin shows no distribution"
        return [
            *ways,
            (
                "judged",
                f"{one_by_one}; {rest} are not judged: {too_little}",
            ),
            (UNSEEN, f"everything from step {steps[until]} on"),
        ]
    figures = ", ".join(f"{f.name} loss {100 * math.expm1(f.allowed):.0f} %" for f in later)
    ways.append(
        (
            "judged",
            f"{one_by_one}, by bands that follow the twins; {rest} as a distribution",
        )
    )
    ways.append((UNSEEN, f"from step {steps[until]} on, what moves the losses by less than: {figures}"))
    return ways


def _how_to_twin(run: Run) -> str:
    trained = f"`{run.command}`" if run.command else "The command that trained the first run"
    return (
        f"{trained} with --twin 1, and again with --twin 2, makes twins beside it; compare finds them there "
        "and judges the rest by them"
    )


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
        *(f"{name:<7} {said}" for name, said in judged_how(found)),
        *(f"accept  {said}" for said in _acceptance(found)),
        "",
        *(line for j in found.quantities for line in _lines(j, width)),
        "",
        *(f"note: {note}" for note in found.notes),
        verdict(found),
    ]
    return "\n".join(lines)


def what_next(found: Comparison) -> str:
    """The command that follows, by what was found."""
    if found.passed and found.twins is None and found.until < len(found.steps) and not found.identical:
        trained = found.first.command or "the command that trained the first run,"
        return f"next: {trained} --twin 1, again with --twin 2, then this comparison"
    if found.passed:
        return f"next: portmoe report {found.second.path}"
    backend = "" if found.second.backend == "unknown" else f" --backend {found.second.backend}"
    config = found.second.path / CONFIG
    return f"next: portmoe bisect --config {config}{backend}, which names the first operation wrong"


def _acceptance(found: Comparison) -> list[str]:
    """The benchmark's acceptance of both, where it applies to either."""
    if found.accepted == (None, None):
        return []
    words = {True: "met", False: "NOT met", None: "not reached"}
    first, second = (words[accepted] for accepted in found.accepted)
    return [f"{acceptance.RULE}: {first} by the first, {second} by the second"]


def html(found: Comparison) -> str:
    """The same on one page, with the curves of both runs, of their distance, its band and the twins'."""
    names = (found.first.backend, found.second.backend)
    if names[0] == names[1]:
        names = (found.first.path.name, found.second.path.name)
    loss, ways = found.loss, judged_how(found)
    outside = [j for j in found.quantities if not j.passed]
    layers = [j for j in found.quantities if "layer" in j.distance.label]
    others = sorted((j for j in found.quantities if j not in layers), key=lambda j: j.passed)
    of_each = Counter(j.passed for j in found.quantities)
    summary = [
        page.facts(
            [
                ("first", found.first.name),
                ("second", found.second.name),
                ("steps in common", f"{len(found.steps)}: {found.steps[0]} … {found.steps[-1]}"),
                *((name, said) for name, said in ways if name != UNSEEN),
                *(("acceptance", said) for said in _acceptance(found)),
                ("quantities that agree", f"{of_each[True]} of {len(found.quantities)}"),
                ("loss, largest relative deviation", f"{loss.largest:.2e}"),
                ("mean loss, first and second", f"{loss.mean_first:.6g} and {loss.mean_second:.6g}"),
                ("variance of the difference", f"{loss.variance:.2e}; a constant offset scores 0"),
            ]
        ),
        *([page.table(COLUMNS, [_row(j, to=True) for j in outside])] if outside else []),
        *map(
            page.paragraph,
            (
                *(f"Unseen: {said}." for name, said in ways if name == UNSEEN),
                *map(page.sentence, found.notes),
            ),
        ),
    ]
    curves = [plot for j in others for plot in _plots(j, found, names)]
    sections = [
        page.Section("Curves", [page.plots(curves, pairs=True)]),
        page.Section("Layers", [bars("share of what is allowed", _shares(layers))] if layers else []),
        page.Section(
            "All quantities",
            [page.table(COLUMNS, [_row(j) for j in found.quantities])],
            folded=True,
            count=str(len(found.quantities)),
        ),
    ]
    status = "pass" if found.passed else "fail"
    return page.page("portmoe compare", status, page.sentence(verdict(found)), summary, sections, of_report())


def _lines(judged: Judged, width: int) -> list[str]:
    tag = "[PASS]" if judged.passed else "[FAIL]"
    where = "" if judged.left_at is None else f", leaves the band at step {judged.left_at}"
    shown = (
        f"largest {judged.largest:.2e}, allowed {_allowed(judged)}"
        if judged.bands
        else "no step judged by itself"
    )
    later = "; ".join(_figure(figure) for figure in judged.later)
    lines = [f"{tag} {judged.distance.label:<{width}}  {shown}{where}"]
    return [*lines, f"{'':{width + 9}}then {later}"] if later else lines


def _allowed(judged: Judged) -> str:
    """The narrowest band, and the widest where they follow the twins."""
    widest = max(judged.bands)
    return f"{judged.band:.0e}" + (f" … {widest:.0e}" if widest > judged.band else "")


def _figure(figure: Figure) -> str:
    return f"{figure.name} {figure.value:.2g} of {figure.allowed:.2g}{'' if figure.passed else ' FAIL'}"


def _row(judged: Judged, to: bool = False) -> page.Row:
    """``to``: the line only leads to the one among all."""
    left = "" if judged.left_at is None else str(judged.left_at)
    label = judged.distance.label
    stepwise = (f"{judged.largest:.2e}", _allowed(judged)) if judged.bands else ("", "")
    cells = (label, *stepwise, left, "; ".join(map(_figure, judged.later)))
    name = page.anchor(label)
    return page.Row("pass" if judged.passed else "fail", cells, "" if to else name, name if to else "")


def _plots(judged: Judged, found: Comparison, names: tuple[str, str]) -> list[str]:
    """The values of both runs and of the twins; their deviation, its band and the twins' spread."""
    apart, first = judged.distance, found.steps[0]
    curves = [(names[0], apart.first), (names[1], apart.second)]
    if found.twins and (values := found.twins.values(apart.label)):
        curves.append(("a twin", values))
    relative = [None if math.isnan(r) else r for r in apart.relative]
    missing = [None] * (len(relative) - len(judged.bands))
    apart_by = [("deviation", relative), ("band", [*judged.bands, *missing])]
    if judged.spread:
        apart_by.append(("twins", [None if math.isnan(s) else s for s in judged.spread]))
    return [
        svg.lines(apart.label, curves, first=first),
        svg.lines(f"{apart.label}: deviation", apart_by, log=True, first=first),
    ]


def _shares(judged: Sequence[Judged]) -> dict[str, list[Bar]]:
    """By parameter group; a quantity without any number in both runs is as far off as can be."""
    groups: dict[str, list[Bar]] = {}
    for j in judged:
        label = j.distance.label
        share = math.inf if math.isnan(j.share) and not j.passed else 0.0 if math.isnan(j.share) else j.share
        bar = Bar(label, share, "pass" if j.passed else "fail", page.anchor(label))
        groups.setdefault(label.rpartition(",")[0], []).append(bar)
    return groups
