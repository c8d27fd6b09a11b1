"""The adaptation guides as data: their files, commands and config snippets."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "adaptation"
LANGUAGES = ("en", "zh")
EXAMPLE = ROOT / "examples" / "newvendor_backend"

# A block, and the file name on a line of its own before it, if there is one.
BLOCK = re.compile(r"(?:^`([\w./-]+)`[:：]\n\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``file`` is the file it is the content of, None where it is something else."""

    file: str | None
    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    return [Block(name or None, kind, text) for name, kind, text in BLOCK.findall(path.read_text("utf-8"))]


def pages() -> list[Path]:
    return sorted(FOLDER.rglob("*.md"))


def commands(path: Path) -> list[str]:
    """The command lines of a page, one each, without comments and continuation."""
    lines = []
    for block in blocks(path):
        if block.language == "sh":
            joined = block.text.replace("\\\n", " ")
            lines += [line for raw in joined.splitlines() if (line := raw.partition(" #")[0].strip())]
    return lines
