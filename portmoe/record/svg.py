"""Plots as inline SVG: lines over steps, and bars against a limit. No scripts, no external resources."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 26, 28
COLOURS = ("#1f5fa8", "#c8501e", "#2e8540")
DASHES = ("none", "6 4", "2 3")

Values = Sequence[float | None]


def lines(
    title: str, series: Sequence[tuple[str, Values]], *, limit: float | None = None, log: bool = False
) -> str:
    """Values by step; gaps where a value is missing or not finite.

    Args:
        limit: a dashed horizontal line.
        log: a logarithmic scale, on which values of 0 lie at its lower end.
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

    parts = [_text(LEFT, 16, title, weight="bold")]
    for tick in _ticks(low, high, log):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>'
        )
        parts.append(_text(LEFT - 6, y(tick) + 4, f"{tick:.3g}", anchor="end"))
    for step in sorted({0, (steps - 1) // 2, steps - 1}):
        parts.append(_text(x(step), HEIGHT - 8, str(step), anchor="middle"))
    if limit is not None:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(limit):.1f}" y2="{y(limit):.1f}" '
            'stroke="#b00" stroke-dasharray="4 4"/>'
        )
    for number, (name, values) in enumerate(series):
        colour, dash = COLOURS[number % 3], DASHES[number % 3]
        for run in _runs(values):
            points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in run)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6" '
                f'stroke-dasharray="{dash}"/>'
            )
        parts.append(
            _text(WIDTH - RIGHT - 150 * (len(series) - number - 1), 16, name, anchor="end", fill=colour)
        )
    return _svg(parts, HEIGHT)


def bars(title: str, rows: Sequence[tuple[str, float, bool]]) -> str:
    """A bar per row on a logarithmic scale from 0.001 to 10, with a line at 1: the share of what is allowed.

    Args:
        rows: label, share, whether it passed.
    """
    row, label = 16, 260
    height = TOP + row * len(rows) + 22

    def x(share: float) -> float:
        place = (math.log10(min(10.0, max(1e-3, share))) + 3) / 4
        return label + (WIDTH - label - RIGHT) * place

    parts = [_text(8, 16, title, weight="bold")]
    for tick in (0.001, 0.01, 0.1, 1.0, 10.0):
        parts.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="{TOP}" y2="{height - 20}" stroke="#ddd"/>')
        parts.append(_text(x(tick), height - 6, f"{tick:g}", anchor="middle"))
    for number, (name, share, passed) in enumerate(rows):
        top = TOP + row * number
        colour = "#2e8540" if passed else "#b00020"
        parts.append(_text(label - 6, top + 11, name, anchor="end"))
        parts.append(
            f'<rect x="{label}" y="{top + 2}" width="{max(1.0, x(share) - label):.1f}" height="{row - 5}" '
            f'fill="{colour}"/>'
        )
    parts.append(
        f'<line x1="{x(1)}" x2="{x(1)}" y1="{TOP}" y2="{height - 20}" stroke="#b00" stroke-dasharray="4 4"/>'
    )
    return _svg(parts, height)


def _svg(parts: Sequence[str], height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", fill: str = "#222"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{fill}">{escape(text)}</text>'
    )


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


def _runs(values: Values) -> list[list[tuple[int, float]]]:
    """The stretches without a gap."""
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in enumerate(values):
        if value is None or not math.isfinite(value):
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [run for run in runs if run]
