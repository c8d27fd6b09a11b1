"""What the walk found, as text, as a tree for JSON and as a page."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from portmoe.files import json_text, strict
from portmoe.ops.table import REFERENCE
from portmoe.record import page
from portmoe.record.bars import Bar, bars
from portmoe.result import Status
from portmoe.verify.bisect.answers import Deviation
from portmoe.verify.bisect.bisect import Bisection, Defect, Judged, Phase

COLUMNS = ("operation", "phase", "tensor", "error")
PHASES: tuple[Phase, ...] = ("forward", "backward", "update")


def text(found: Bisection) -> str:
    """The walk phase by phase, the whole model, and what to do about it last."""
    model = found.config.architecture
    lines = [
        f"reference  {found.reference}, plain references",
        f"backend    {found.backend} ({found.device})",
        f"step       {len(model.layers)} layers, hidden {model.hidden}, {found.config.model.dtype}, "
        f"{found.tokens} tokens, seed {found.config.run.seed}",
        "",
        *(_phase(found, phase) for phase in PHASES),
        _whole(found),
        *(f"note       {note}" for note in (*found.notes, *found.whole.notes)),
        "",
        *_verdict(found),
    ]
    return "\n".join(lines)


def as_dict(found: Bisection) -> dict[str, Any]:
    """Return the same as JSON types; infinities, which JSON does not have, as text."""
    defects = list(found.defects())
    document = {
        "reference": found.reference,
        "backend": found.backend,
        "device": found.device,
        "passed": found.passed,
        "provenance": dict(found.provenance),
        "seed": found.config.run.seed,
        "dtype": found.config.model.dtype,
        "tokens": found.tokens,
        "first": _defect(found, defects[0]) if defects else None,
        "defects": [_defect(found, defect) for defect in defects],
        "whole_model": {**asdict(found.whole), "passed": found.whole.passed},
        "calls": [
            {
                "place": judged.place,
                "operation": judged.operation,
                "implementation": judged.implementation,
                "results": [{**asdict(d), "defect": d.defect} for d in judged.deviations],
            }
            for judged in found.calls
        ],
        "notes": found.notes,
    }
    return strict(document, words=True)


def json(found: Bisection) -> str:
    """Return ``as_dict`` as the text of a file."""
    return json_text(as_dict(found), indent=1) + "\n"


def what_next(found: Bisection, backend: str, config: str, overrides: Sequence[str] = ()) -> str:
    """The command that follows, by what was found; with the settings that were walked."""
    if found.passed:
        settings = [part for override in overrides for part in ("--set", override)]
        return (
            f"next: {shlex.join(['portmoe', 'train', '--backend', backend, '--config', config, *settings])}"
        )
    return f"next: repair what is named, or switch it off, and portmoe bisect --backend {backend} again"


def html(found: Bisection) -> str:
    """Return the page: what was walked, the defects in the order of the walk, every call's worst result."""
    defects = list(found.defects())
    places = {id(judged): place for place, judged in enumerate(found.calls)}
    wrong = [
        page.Row("fail", _cells(d.phase, d.judged, d.deviation), target=_name(d.phase, places[id(d.judged)]))
        for d in defects
    ]
    calls: list[page.Row] = []
    shares: dict[str, list[Bar]] = {}
    for place, judged in enumerate(found.calls):
        for phase in PHASES:
            worst = judged.worst(phase)
            if worst is not None:
                state: Status = "fail" if worst.defect else "pass"
                name = _name(phase, place)
                calls.append(page.Row(state, _cells(phase, judged, worst), name))
                bar = Bar(f"{judged.place}: {judged.subject}, {phase}", worst.badness, state, name)
                shares.setdefault(judged.operation, []).append(bar)
    sections = [
        page.Section("Wrong", [page.table(COLUMNS, wrong)] if wrong else []),
        page.Section("Error", [bars("share of what rounding explains", shares)] if shares else []),
        page.Section("Every call", [page.table(COLUMNS, calls)] if calls else [], True, str(len(calls))),
    ]
    model = found.config.architecture
    walked = f"{len(model.layers)} layers, hidden {model.hidden}, {found.config.model.dtype}"
    stated = [
        ("reference", f"{found.reference}, plain references"),
        ("backend", f"{found.backend} ({found.device})"),
        ("step", f"{walked}, {found.tokens} tokens, seed {found.config.run.seed}"),
        *(tuple(_phase(found, phase).split(maxsplit=1)) for phase in PHASES),
        ("whole model", _whole(found).split(maxsplit=1)[1]),
    ]
    notes = [page.paragraph(note) for note in (*found.notes, *found.whole.notes)]
    repair = [page.code("\n".join(_verdict(found)[1:]))] if defects else []
    return page.page(
        "portmoe bisect",
        "pass" if found.passed else "fail",
        page.sentence(verdict(found)),
        [*repair, page.facts(stated), *notes],
        sections,
        found.provenance,
    )


def _cells(phase: Phase, judged: Judged, deviation: Deviation) -> tuple[str, ...]:
    return f"{judged.place}: {judged.subject}", phase, deviation.tensor, _figures(deviation)


def _name(phase: Phase, place: int) -> str:
    return f"{phase}-{place}"


def _figures(deviation: Deviation) -> str:
    return deviation.wrong or f"{deviation.error:.1e} of {deviation.explained:.1e} explained"


def verdict(found: Bisection) -> str:
    """Return the outcome in one line."""
    first = next(found.defects(), None)
    if first is not None:
        return f"first wrong: {first.judged.place}: {first.judged.subject}, {first.phase}"
    if found.whole.raised:
        return "every operation agrees, and the whole model does not run"
    if found.whole.starts:
        return f"every operation agrees, and the whole model does not: it starts in {found.whole.starts}"
    return "every operation and the whole model agree"


def _phase(found: Bisection, phase: Phase) -> str:
    worst = [d for d in (judged.worst(phase) for judged in found.calls) if d is not None]
    wrong = sum(d.defect for d in worst)
    share = max((d.badness for d in worst), default=0.0)
    state = f"{wrong} wrong" if wrong else f"all agree; at most {share:.2f} of what rounding explains"
    return f"{phase:<10} {len(worst)} calls, {state}"


def _whole(found: Bisection) -> str:
    whole = found.whole
    if whole.raised:
        return f"whole      raised {whole.raised}"
    return (
        f"whole      deviation of the loss {whole.loss:.1e}, the auxiliary loss {whole.aux_loss:.1e}, a "
        f"parameter's gradient {whole.gradient:.1e} ({whole.parameter}); allowed {whole.band_forward:.0e}, "
        f"gradients {whole.band_backward:.0e}"
    )


def _verdict(found: Bisection) -> list[str]:
    defects = list(found.defects())
    if not defects:
        return [verdict(found)]
    first = defects[0]
    deviation = first.deviation
    error = deviation.wrong or (
        f"error {deviation.error:.1e}; {found.config.model.dtype} explains {deviation.explained:.1e}"
    )
    lines = [verdict(found), f"  {deviation.tensor}: {error}"]
    others = Counter((d.judged.subject, d.phase) for d in defects[1:])
    lines += [f"  also wrong: {subject}, {phase}: {n} calls" for (subject, phase), n in others.items()]
    return [*lines, f"  to switch it off: {switch_off(found, first)}"]


def switch_off(found: Bisection, defect: Defect) -> str:
    """The config key that takes the implementation out, or why there is none."""
    judged = defect.judged
    if not judged.implementation:
        return "no key does: it is torch's own product on this device"
    if judged.implementation == REFERENCE:
        return "no key does: it is the plain reference, and an operator of torch on this device is wrong"
    instead = found.replacements[judged.subject]
    if instead is None:
        return "no key does: nothing else computes this operation here"
    return f"ops.disable: [{judged.subject}] ({judged.operation}.{instead} computes the same function then)"


def _defect(found: Bisection, defect: Defect) -> dict[str, Any]:
    return {
        "phase": defect.phase,
        "place": defect.judged.place,
        "operation": defect.judged.operation,
        "implementation": defect.judged.implementation,
        "tensor": defect.deviation.tensor,
        "error": defect.deviation.error,
        "explained": defect.deviation.explained,
        "wrong": defect.deviation.wrong,
        "switch_off": switch_off(found, defect),
    }
