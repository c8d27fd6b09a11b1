"""Shares of what is allowed as bars: a line a group with its worst, which opens to show the others."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from portmoe.record.page import anchor
from portmoe.result import Status

# The bars are on a logarithmic scale between the first and the last of these.
TICKS = (0.001, 0.01, 0.1, 1.0, 10.0)


class Bar(NamedTuple):
    """One share: 1 is all that is allowed; ``target``: the anchor of a table's line that says more."""

    label: str
    share: float
    status: Status
    target: str = ""


def bars(title: str, groups: Mapping[str, Sequence[Bar]]) -> str:
    """Return the bars, the worst group and in it the worst bar first, under their axis.

    Args:
        groups: by name; a group of one bar is a line of its own, one with a failure is open.
    """
    ordered = [(name, sorted(rows, key=_badness, reverse=True)) for name, rows in groups.items() if rows]
    ordered.sort(key=lambda group: _badness(group[1][0]), reverse=True)
    places = "".join(f'<span style="--x:{_place(tick):g}%">{_tick(tick)}</span>' for tick in TICKS)
    axis = (
        '<div class="row axis" aria-hidden="true"><span class="label"></span>'
        f'<span class="ticks">{places}</span><span class="value"></span></div>'
    )
    lines = [_group(name, rows) for name, rows in ordered]
    return (
        f'<figure class="bars"><figcaption>{escape(title)} <small>1 is all that is allowed; logarithmic; '
        f"worst first</small></figcaption>{axis}<ul>{''.join(lines)}</ul></figure>"
    )


def _group(name: str, rows: Sequence[Bar]) -> str:
    if len(rows) == 1:
        return f'<li class="{rows[0].status}">{_line(rows[0], "row " + rows[0].status)}</li>'
    worst = rows[0]
    head = _line(Bar(f"{name} ({len(rows)})", worst.share, worst.status), "row " + worst.status, "summary")
    inner = "".join(f'<li class="{bar.status}">{_line(bar, "row " + bar.status)}</li>' for bar in rows)
    opened = " open" if worst.status == "fail" else ""
    return f'<li class="{worst.status}"><details{opened}>{head}<ul>{inner}</ul></details></li>'


def _line(bar: Bar, classes: str, element: str = "div") -> str:
    label = escape(bar.label)
    linked = f'<a href="#{anchor(bar.target)}">{label}</a>' if bar.target else label
    return (
        f'<{element} class="{classes}"><span class="label">{linked}</span>'
        f'<span class="track"><i style="--w:{_place(bar.share):.1f}%"></i></span>'
        f'<span class="value">{_share(bar.share)}</span></{element}>'
    )


def _badness(bar: Bar) -> tuple[bool, float]:
    return bar.status == "fail", math.inf if math.isnan(bar.share) else bar.share


def _place(share: float) -> float:
    """Where on the axis, in per cent."""
    low, high = math.log10(TICKS[0]), math.log10(TICKS[-1])
    if math.isnan(share):
        return 100.0
    return 100 * (math.log10(min(TICKS[-1], max(TICKS[0], share))) - low) / (high - low)


def _tick(tick: float) -> str:
    return f"{tick:g} = allowed" if tick == 1 else f"{tick:g}"


def _share(share: float) -> str:
    return f"{share:.2g}" if math.isfinite(share) else "∞"
