"""Plots of values by step, as inline SVG of a page, which colours them; each also says itself in words."""

import math
import re
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 60, 8, 8, 22
STYLES = 3  # of lines, as page.css has them
COLUMNS = 160  # of points: of more steps each column keeps its lowest and its highest value

Values = Sequence[float | None]


def lines(
    title: str,
    series: Sequence[tuple[str, Values]],
    *,
    limit: float | None = None,
    log: bool = False,
    first: int = 0,
) -> str:
    """Return values by step, under a heading with the names; gaps where one is missing or not finite.

    Args:
        limit: a dashed horizontal line.
        log: a logarithmic scale, on which values of 0 lie at its lower end.
        first: the step of the first value.
    """
    finite = [v for _, values in series for v in values if v is not None and math.isfinite(v)]
    finite += [] if limit is None else [limit]
    if log:
        finite = [v for v in finite if v > 0] or [1e-12, 1.0]
    low, high = _range(finite, log)
    steps = max((len(values) for _, values in series), default=1)

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, steps - 1)

    def y(value: float) -> float:
        share = (_scaled(value, log, low) - _scaled(low, log, low)) / (
            _scaled(high, log, low) - _scaled(low, log, low)
        )
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(1.0, max(0.0, share))

    def across(kind: str, value: float) -> str:
        return (
            f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )

    parts = []
    for tick in _ticks(low, high, log):
        parts += [across("grid", tick), _text(LEFT - 5, y(tick) + 4, _figure(tick), "end")]
    for step in sorted({0, (steps - 1) // 2, steps - 1}):
        at_end = "end" if step and step == steps - 1 else "middle"
        parts.append(_text(x(step), HEIGHT - 6, f"{'step ' * (step == 0)}{first + step}", at_end))
    if limit is not None:
        parts.append(across("limit", limit))
    for number, (_, values) in enumerate(series):
        for run in _runs(_thinned(values)):
            points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in run * (1 + (len(run) == 1)))
            parts.append(f'<polyline class="s{number % STYLES}" points="{points}"/>')
    words = "; ".join(_in_words(name, values) for name, values in series)
    words += f"; allowed {limit:.3g}" if limit is not None else ""
    keys = [_key(f"s{number % STYLES}", name) for number, (name, _) in enumerate(series) if name]
    keys += [] if limit is None else [_key("limit", "allowed")]
    return (
        f"<figure><figcaption>{escape(title)}<br>{''.join(keys)}</figcaption>"
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}, {words}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def columns(title: str, names: Sequence[str], counts: Sequence[int]) -> str:
    """Return how many of each there are as columns, under a heading; the first and the last are named."""
    most = max(counts, default=0) or 1
    width = (WIDTH - LEFT - RIGHT) / max(1, len(counts))
    full = HEIGHT - TOP - BOTTOM
    parts = [_text(LEFT - 5, TOP + 8, _figure(most), "end"), _text(LEFT - 5, HEIGHT - BOTTOM, "0", "end")]
    for number, count in enumerate(counts):
        high = full * count / most
        parts.append(
            f'<rect class="column" x="{LEFT + number * width + 1:.1f}" y="{HEIGHT - BOTTOM - high:.1f}" '
            f'width="{width - 2:.1f}" height="{high:.1f}"/>'
        )
    if names:
        parts.append(_text(LEFT, HEIGHT - 6, names[0], "start"))
        parts.append(_text(WIDTH - RIGHT, HEIGHT - 6, names[-1], "end"))
    words = "; ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=True))
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}, {words}")}">{"".join(parts)}</svg></figure>'
    )


def _key(kind: str, name: str) -> str:
    line = f'<line class="key {kind}" x2="26" y1="4" y2="4"/>'
    return f'<span class="key"><svg aria-hidden="true">{line}</svg>{escape(name)}</span>'


def _in_words(name: str, values: Values) -> str:
    finite = [v for v in values if v is not None and math.isfinite(v)]
    what = f"{name}: " if name else ""
    if not finite:
        return f"{what}no values"
    missing = f", {len(values) - len(finite)} of {len(values)} missing" if len(finite) < len(values) else ""
    return (
        f"{what}{len(values)} steps from {finite[0]:.3g} to {finite[-1]:.3g}, lowest {min(finite):.3g}, "
        f"highest {max(finite):.3g}{missing}"
    )


def _figure(value: float) -> str:
    """Three digits in as few characters as a tick has room for: 12.6k, 1e-5."""
    if 1e3 <= abs(value) < 1e6:
        return f"{value / 1e3:.3g}k"
    if 0 < abs(value) < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return re.sub(r"e([+-])0", r"e\1", f"{value:.3g}").replace("e+", "e")


def _text(x: float, y: float, text: str, align: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{align}">{escape(text)}</text>'


def _range(finite: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if log:
        return 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9)
    if low == high:
        return low - abs(low) / 10 - 1e-12, high + abs(high) / 10 + 1e-12
    return low, high


def _scaled(value: float, log: bool, low: float) -> float:
    return math.log10(max(value, low)) if log else value


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if not log:
        return [low + (high - low) * i / 4 for i in range(5)]
    first, last = round(math.log10(low)), round(math.log10(high))
    stride = max(1, (last - first) // 5)
    return [10.0**power for power in range(first, last + 1, stride)]


def _runs(points: Sequence[tuple[int, float | None]]) -> list[list[tuple[int, float]]]:
    """The stretches without a gap."""
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in points:
        if value is None or not math.isfinite(value):
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [run for run in runs if run]


def _thinned(values: Values) -> list[tuple[int, float | None]]:
    """The values with their steps; where there are many, a column's lowest, highest and missing ones."""
    points = list(enumerate(values))
    if len(points) <= 2 * COLUMNS:
        return points
    width = math.ceil(len(points) / COLUMNS)
    kept: list[tuple[int, float | None]] = []
    for start in range(0, len(points), width):
        column = points[start : start + width]
        there = [(v, i) for i, v in column if v is not None and math.isfinite(v)]
        steps = {i for _, i in (min(there), max(there))} if there else set()
        gap = next((i for i, v in column if v is None or not math.isfinite(v)), None)
        steps |= set() if gap is None else {gap}
        kept += [(i, values[i]) for i in sorted(steps)]
    return kept
