"""The page of every report, read back by an HTML parser: what it promises its readers."""

import math
import random
from html.parser import HTMLParser

import pytest

from portmoe.record import page, svg
from portmoe.record.bars import Bar, bars
from portmoe.record.origin import of_report

MOST = 300_000  # bytes of a page


class Read(HTMLParser):
    """A page's tags with their attributes, and its text outside of styles."""

    def __init__(self, document):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "i", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while tag in self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def checked(document):
    """The page, after what holds for every one."""
    read = Read(document)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in read.tags}
    assert not any(outside in document for outside in ("http://", "https://", "src=", "url(", "@import"))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in read.of("meta")
    assert "prefers-color-scheme: dark" in document
    assert "@media print" in document
    names = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for link in read.of("a"):
        assert link["href"].startswith("./") or link["href"].removeprefix("#") in names, link
    for drawn in read.of("svg"):
        assert drawn.get("aria-hidden") or len(drawn["aria-label"]) > 20
    assert len(document.encode()) < MOST
    return read


def test_a_page_leads_from_the_verdict_to_every_row():
    rows = [
        page.Row("fail", ("a <b>", "1.5", "& why"), "row"),
        page.Row("pass", ("fine", "2", ""), target="./other.txt"),
    ]
    short = page.table(("what", "how much", 'say "why"'), [page.Row("fail", ("a <b>",), target="row")])
    sections = [
        page.Section("Plots", [page.plots([svg.lines("loss", [("one", [1.0, None, 0.5])], limit=2.0)])]),
        page.Section("Empty", []),
        page.Section("All rows", [page.table(("what", "how much", "why"), rows)], True, "2"),
    ]
    made = {"date": "2026-01-01", "host": "here", "commit": None, "command": "portmoe <x>"}
    read = checked(page.page("portmoe test", "fail", "It is 3 < 4.", [short], sections, made))
    text = " ".join(" ".join(read.text).split())
    order = ["portmoe test · 2026-01-01 · here", "✗ failed It is 3 < 4.", "a <b>", "Plots All rows", "& why"]
    places = [text.index(part, text.index("portmoe test · 2026")) for part in order]
    assert places == sorted(places)
    assert "Empty" not in text
    assert "commit" not in text
    assert "portmoe <x>" in text
    folded = [attributes.get("id") for attributes in read.of("details")]
    assert folded == ["all-rows", None]
    assert "1 of 3 missing" in read.of("svg")[-1]["aria-label"]


@pytest.mark.parametrize("status", ["pass", "warn", "fail", "skip"])
def test_a_verdict_is_an_icon_and_a_word_and_not_a_colour(status):
    read = checked(page.page("t", status, "So it is.", [], []))
    assert "".join(read.text).split("\n")[1].startswith(f"t{page.ICONS[status]} {page.WORDS[status]}")
    assert len(set(page.ICONS.values())) == len(set(page.WORDS.values())) == len(page.ICONS)


def test_bars_are_grouped_and_the_worst_come_first():
    groups = {
        "calm": [Bar("calm one", 0.1, "pass"), Bar("calm two", 0.9, "pass")],
        "alone": [Bar("alone", 0.5, "pass")],
        "broken": [Bar("far off", math.nan, "fail"), Bar("fine", 0.01, "pass"), Bar("off", 3.0, "fail")],
        "none": [],
    }
    read = Read(bars("shares", groups))
    text = [part for part in read.text if part.strip()]
    ticks = ["0.001", "0.01", "0.1", "1 = allowed", "10"]
    assert text[: text.index("broken (3)")][-5:] == ticks
    named = [part for part in text[text.index("broken (3)") :] if part[0].isalpha()]
    assert named == ["broken (3)", "far off", "off", "fine", "calm (2)", "calm two", "calm one", "alone"]
    assert read.of("details") == [{"open": None}, {}]
    widths = [attributes["style"] for attributes in read.of("i")]
    assert widths[0] == "--w:100.0%"
    assert widths[2] == "--w:86.9%"  # (log10(3) + 3) / 4


def test_a_long_run_is_thinned_and_keeps_its_spikes_and_gaps():
    generator = random.Random(0)
    values = [generator.random() for _ in range(100_000)]
    values[4321], values[60_000] = 9.0, None
    drawn = svg.lines("loss", [("a", values)])
    assert len(drawn) < 6000
    read = Read(drawn)
    heights = [float(point.split(",")[1]) for line in read.of("polyline") for point in line["points"].split()]
    assert min(heights) == pytest.approx(svg.TOP, abs=0.1)
    assert len(read.of("polyline")) == 2
    assert "highest 9, 1 of 100000 missing" in read.of("svg")[-1]["aria-label"]
    fine = "".join(svg.lines(f"{n}", [("a", values[:5000])] * 2) for n in range(30))
    checked(page.page("t", "pass", "Long.", [], [page.Section("Plots", [page.plots([fine])])]))


def test_one_value_and_none_are_drawn():
    assert 'points="' in svg.lines("loss", [("a", [None, 2.0, None])])
    assert "no values" in svg.lines("loss", [("a", [None, math.inf])], log=True)


def test_a_report_says_who_made_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/site-packages/portmoe/__main__.py", "compare", "a b", "c"])
    made = of_report({"driver": "1.2"}, seed=3)
    assert made["command"] == "python -m portmoe compare 'a b' c"
    assert (made["seed"], made["driver"]) == (3, "1.2")
    assert made["date"].endswith(" UTC")
    assert all(made[key] for key in ("host", "portmoe", "torch", "python", "system"))


def test_ticks_are_short_enough_for_their_place():
    drawn = Read(svg.lines("speed", [("a", [8792.0, 12634.5]), ("b", [12000.0, 9000.0])]))
    assert {"8.79k", "12.6k"} <= set(drawn.text)
    assert "3.05e-4" in Read(svg.lines("load", [("a", [3.052e-4, 0.438])])).text
    for values in ([-1.234e-5, 4.2e-5], [1.5e12, 2.5e12], [1e-30, 3.2e-30], [-3.05e-4, 0.4]):
        ticks = Read(svg.lines("x", [("a", values)])).text
        assert max(len(text) for text in ticks if text not in ("x", "a")) <= 8
