"""The one HTML page of every report: a verdict, what it is decided by, sections, and how it was made.

A page needs no other file and no network, fits 390 pixels, follows the reader's light or dark setting, and
prints its verdict and summary on the first sheet. Everything given as text is escaped here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import NamedTuple

from portmoe.result import Status

ICONS: Mapping[Status, str] = {"pass": "✓", "warn": "⚠", "fail": "✗", "skip": "–"}
WORDS: Mapping[Status, str] = {"pass": "passed", "warn": "attention", "fail": "failed", "skip": "not judged"}


@dataclass(frozen=True)
class Section:
    """A part of a page: blocks of HTML, as the functions here, ``svg.lines`` and ``bars.bars`` make them.

    Attributes:
        heading: also its entry in the list of contents.
        folded: shown as a heading that opens: what is looked up rather than read.
        count: a few words beside the heading, as in "67 checks".
    """

    heading: str
    blocks: Sequence[str]
    folded: bool = False
    count: str = ""


class Row(NamedTuple):
    """A line of a table.

    Attributes:
        status: an icon before the first cell; "": none.
        anchor: the line's name, that ``target`` of another one, or of a bar, leads to.
        target: the anchor of a line that says more, or "./" and a file beside the page.
    """

    status: Status | str
    cells: Sequence[str]
    anchor: str = ""
    target: str = ""


def page(
    title: str,
    status: Status,
    verdict: str,
    summary: Sequence[str],
    sections: Sequence[Section],
    provenance: Mapping[str, object] | None = None,
) -> str:
    """Return the whole document.

    Args:
        title: what was asked, as in "portmoe compare".
        verdict: one short sentence.
        summary: blocks: what a reader decides by.
        sections: in order: plots first, then what is folded; those without blocks are left out.
        provenance: as ``origin.of_report`` gives it.
    """
    shown = [section for section in sections if section.blocks]
    made = dict(provenance or {})
    origin = " · ".join(str(made[key]) for key in ("date", "host") if made.get(key))
    head = f"{escape(title)} · {escape(origin)}" if origin else escape(title)
    badge = f'<span class="badge {status}">{ICONS[status]} {WORDS[status]}</span>'
    contents = "".join(f'<li><a href="#{anchor(s.heading)}">{escape(s.heading)}</a></li>' for s in shown)
    body = [
        f'<header><p class="origin">{head}</p><h1>{badge} {escape(verdict)}</h1>',
        *summary,
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>' if len(shown) > 1 else "",
        "</header><main>",
        *map(_section, shown),
        f"</main>{_footer(made)}",
    ]
    style = files("portmoe.record").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{ICONS[status]} {escape(verdict)} – {escape(title)}</title>"
        f"<style>{style}</style></head><body>\n{chr(10).join(filter(None, body))}\n</body></html>\n"
    )


def _section(section: Section) -> str:
    count = f'<span class="count">{escape(section.count)}</span>' if section.count else ""
    head = f"<h2>{escape(section.heading)}</h2>{count}"
    name, blocks = anchor(section.heading), "\n".join(section.blocks)
    if section.folded:
        return f'<details class="section" id="{name}"><summary>{head}</summary>{blocks}</details>'
    return f'<section id="{name}">{head}{blocks}</section>'


def _footer(made: Mapping[str, object]) -> str:
    rows = [(key, str(value)) for key, value in made.items() if value not in (None, "")]
    if not rows:
        return ""
    return f"<footer><details><summary>How this was made</summary>{facts(rows)}</details></footer>"


def sentence(text: str) -> str:
    """Return a verdict as a sentence: "the runs agree" → "The runs agree."."""
    return f"{text[:1].upper()}{text[1:]}."


def anchor(text: str) -> str:
    """Return ``text`` as the name of a place on the page."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-")


def paragraph(text: str) -> str:
    """Return a paragraph of ``text``."""
    return f"<p>{escape(text)}</p>"


def code(text: str) -> str:
    """Return ``text`` as it would stand in a terminal or a file: commands, settings."""
    return f"<pre><code>{escape(text)}</code></pre>"


def marked(runs: Sequence[tuple[str, bool]]) -> str:
    """Return text as ``code`` does, some runs of it marked."""
    parts = (f"<mark>{escape(text)}</mark>" if mark else escape(text) for text, mark in runs)
    return f"<pre><code>{''.join(parts)}</code></pre>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Return names and values side by side."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f"<dl>{cells}</dl>"


def plots(figures: Sequence[str], pairs: bool = False) -> str:
    """Return figures of ``svg`` beside each other, as many as fit; ``pairs``: at most two."""
    return f'<div class="plots{" pairs" * pairs}">{"".join(figures)}</div>'


def table(columns: Sequence[str], rows: Sequence[Row | tuple[Status | str, Sequence[str]]]) -> str:
    """Return a table of at most nine columns; where the page is narrow each line becomes a block."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    names = ";".join(f'--c{n}:"{column}"' for n, column in enumerate(columns, 1) if n > 1)
    body = "\n".join(_row(Row(*row)) for row in rows)
    return f'<table style="{escape(names)}"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'


def _row(row: Row) -> str:
    cells = []
    for number, cell in enumerate(row.cells):
        text = escape(cell)
        if row.target and not number:
            href = row.target if row.target.startswith("./") else f"#{row.target}"
            text = f'<a href="{escape(href)}">{text}</a>'
        cells.append(f"<td class=n>{text}</td>" if _is_number(cell) else f"<td>{text}</td>")
    name = f' id="{row.anchor}"' if row.anchor else ""
    state = f" class={row.status}" if row.status else ""
    return f"<tr{state}{name}>{''.join(cells)}</tr>"


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
