"""A preview of data as a person sees it: in the terminal, and as the one page of every report."""

from collections.abc import Iterator
from itertools import pairwise

from rich.console import Console
from rich.text import Text

from portmoe.planning.preview import Preview
from portmoe.record import origin
from portmoe.record.page import Row, Section, code, facts, marked, page, paragraph, plots, table
from portmoe.record.svg import columns

WIDEST = 30  # characters of a bar
LOST = ("records are left out:", "× truncated")  # how lines end that tell of tokens nobody learns
# What would control the terminal is shown instead.
VISIBLE = {number: 0x2400 + number for number in range(32) if chr(number) not in "\n\t"} | {127: 0x2421}
BEFORE, AFTER = "⟦", "⟧"  # around what is learned, so that it does not need colours


def told(found: Preview, console: Console) -> None:
    """Print the preview."""
    for shown in found.shown:
        console.print(Text(f"{shown.place} ({shown.tokens} tokens)", "bold"))
        for text, learned in shown.runs:
            visible = text.translate(VISIBLE)
            run = Text(f"{BEFORE}{visible}{AFTER}", "green") if learned else Text(visible)
            console.print(run, end="")
        console.print("\n")
    most = max(found.counts, default=1)
    console.print(Text("tokens a sample", "bold"))
    for name, count in zip(_bins(found), found.counts, strict=True):
        console.print(f"{name:>15} {'▇' * -(-WIDEST * count // most)} {count:,}")
    console.print()
    for name, text in _facts(found):
        console.print(f"{name:<10} {text}")
    if found.said:
        console.print("\n" + "\n".join(found.said))


def html(found: Preview, config_name: str) -> str:
    """The preview as a page."""
    samples = sum(count for count, _ in found.sources.values())
    lost = [line.strip(" :") for line in found.said if line.endswith(LOST)]
    numbers = facts(list(_facts(found)))
    verdict = f"{samples:,} samples, {found.learned:.1%} of their tokens are learned."
    return page(
        "portmoe data preview",
        "warn" if lost else "pass",
        verdict,
        [numbers, paragraph(f"{'; '.join(lost)}: see Problems.")] if lost else [numbers],
        [
            Section(
                "Samples",
                [
                    block
                    for shown in found.shown
                    for block in (paragraph(f"{shown.place} ({shown.tokens} tokens)"), marked(shown.runs))
                ],
                count="what is learned is marked",
            ),
            Section("Lengths", [plots([columns("Tokens a sample", list(_bins(found)), found.counts)])]),
            Section("Sources", [_sources(found)]),
            Section("Problems", [code("\n".join(found.said))] if found.said else []),
        ],
        origin.of_report({"config": config_name}),
    )


def _facts(found: Preview) -> Iterator[tuple[str, str]]:
    packs = found.packs
    for name, (samples, tokens) in found.sources.items():
        label = f"source {name}" if len(found.sources) > 1 else "data"
        yield label, f"{samples:,} samples, {tokens:,} tokens"
    counted = f" (of {found.read:,} samples)" if found.read < packs.samples else ""
    yield "learned", f"{found.learned:.1%} of the tokens{counted}"
    yield (
        "packing",
        f"{found.packing}: {packs.rows:,} rows of {packs.seq_len:,} tokens, {packs.efficiency:.1%} full, "
        f"{packs.divided:,} samples divided",
    )
    ranks = f"{found.ranks} rank{'s' * (found.ranks > 1)}"
    yield "steps", f"{packs.steps_per_epoch:,.4g} an epoch on {ranks}, {packs.total_steps:,} in all"


def _bins(found: Preview) -> Iterator[str]:
    for first, last in pairwise(found.edges):
        yield f"{first:,}–{last - 1:,}" if last - 1 > first else f"{first:,}"


def _sources(found: Preview) -> str:
    rows = [
        Row("", [name, f"{samples:,}", f"{tokens:,}", f"{tokens / max(samples, 1):,.0f}"])
        for name, (samples, tokens) in found.sources.items()
    ]
    return table(["Source", "Samples", "Tokens", "Tokens a sample"], rows)
