"""The one HTML page of every report: a verdict, and sections of paragraphs, tables and plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
body{font:14px/1.45 sans-serif;margin:2em auto;max-width:1080px;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}
td,th{padding:2px 10px;border-bottom:1px solid #ddd;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}tr.fail td{background:#fde8e8}
tr.skip td{color:#888}
.pass{color:#2e8540}.fail{color:#b00020}h1 span{font-size:.8em}svg{display:block;margin:1em 0}
"""


@dataclass(frozen=True)
class Section:
    """A part of a page: blocks of HTML, as the functions here and in ``svg`` make them, under a heading."""

    heading: str  # "": none
    blocks: Sequence[str]


def page(title: str, verdict: str, passed: bool, sections: Sequence[Section]) -> str:
    """Return the whole document, which needs no other file; a section without blocks is left out."""
    state = "pass" if passed else "fail"
    body = []
    for section in sections:
        if section.blocks:
            body += [f"<h2>{escape(section.heading)}</h2>"] if section.heading else []
            body += section.blocks
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<style>{_STYLE}</style></head><body><h1>{escape(title)} <span class="{state}">{escape(verdict)}'
        f"</span></h1>\n{chr(10).join(body)}\n</body></html>\n"
    )


def paragraph(text: str) -> str:
    """Return a paragraph of ``text``."""
    return f"<p>{escape(text)}</p>"


def table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """``rows``: a status ("pass", "fail", "skip" or "") and the cells; numbers are set to the right."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for status, cells in rows:
        shown = "".join(f'<td class="{_kind(cell)}">{escape(cell)}</td>' for cell in cells)
        lines.append(f'<tr class="{status}">{shown}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _kind(cell: str) -> str:
    try:
        float(cell)
    except ValueError:
        return "text"
    return "number"
