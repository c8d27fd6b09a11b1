"""What comes of a config of another program: a config of ours, and all that is not in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portmoe.config import yaml as config_yaml
from portmoe.config.literals import ALLOWED, Unreadable
from portmoe.config.messages import shorten
from portmoe.config.read import parse_config
from portmoe.config.schema import Config


@dataclass(frozen=True)
class LeftOut:
    """A key of the file that is not in the result."""

    key: str
    value: str
    line: int
    why: str

    def __str__(self) -> str:
        key = self.key if self.key.isprintable() else shorten(self.key)
        return f"line {self.line}: {key:.120} = {self.value}: {self.why}"


@dataclass
class Imported:
    """The outcome: ``tree`` holds what was carried over.

    Attributes:
        program: whose config it is.
        defaults: keys that the file does not give, each with the value it has then: the program's default, or
            portmoe's where it has no such key.
        notes: what the person who imports it is to know besides.
        of_the_model: how keys begin without which the model may be another.
    """

    program: str
    source: str
    tree: dict[str, Any]
    left_out: list[LeftOut]
    defaults: list[str]
    notes: list[str]
    of_the_model: tuple[str, ...] = ("model.", "moe.")

    @property
    def config(self) -> Config:
        """The typed whole, read from what ``yaml`` writes."""
        return parse_config(self.yaml(), self.source)

    @property
    def model_may_differ(self) -> bool:
        """Whether a key of the model itself was left out."""
        return any(item.key.startswith(self.of_the_model) for item in self.left_out)

    def yaml(self) -> str:
        """A config file, with what is not in it as comments on top."""
        head = [f"Imported from {shorten(Path(self.source).name)}."]
        if self.left_out:
            head += ["Not carried over:", *(f"  {item}" for item in self.left_out)]
        return "".join(f"# {line}\n" for line in head) + config_yaml.dump(self.tree)


def not_read(source: str, unread: Sequence[Unreadable]) -> str:
    """The message that refuses a file for values that only executing it could give."""
    lines = dict.fromkeys(f"line {u.line}: {shorten(u.source)}: {u.why}" for u in unread)
    listed = "".join(f"\n  {line}" for line in lines)
    return f"{source}: cannot be read without executing it, which is not done:{listed}\n  {ALLOWED}"
