"""The YAML dialect of config files: a tree of plain values, nothing clever.

Scalars follow YAML 1.2's core schema, so that ``1e-4`` is a number, ``no`` and ``2026-01-31`` are
text. Duplicate keys, keys that are not text, anchors, tags, control characters and deep nesting
are refused: each is a mistake in a config, and together they make reading safe for any input.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

MAX_DEPTH = 10  # the config's own depth is 4
MAX_BYTES = 256 * 1024

_CORE_SCHEMA = [
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$",
        list("-+0123456789."),
    ),
]


class YamlError(Exception):
    """The text is not a config in this dialect; the message says where and why."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's interface)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None):  # an alias has one too
            raise _error("anchors and aliases are not allowed; write the value out", event.start_mark)
        if getattr(event, "tag", None):
            raise _error(f"tags ({event.tag}) are not allowed; write a plain value", event.start_mark)
        if self.depth == MAX_DEPTH:
            raise _error(f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _error(f"the key {key!r:.40} must be text", key_node.start_mark)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise _error(
                    f"the key {key!r:.60} was already given on line {seen[key]}", key_node.start_mark
                )
            seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and not value.replace("\n", "").replace("\t", "").isprintable():
            raise _error(
                f"the text {value!r:.60} contains characters that cannot be printed", node.start_mark
            )
        return value


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either schema would read as something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def parse(text: str) -> Any:
    """The value written in ``text``: dict with str keys, list, str, int, float, bool or None.

    Raises:
        YamlError: naming the line and what is wrong.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(f"{where}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise YamlError(
            f"character #x{ord(error.character):x} at position {error.position} is not allowed in YAML"
            if isinstance(error.character, str)
            else f"character #x{error.character:x} at position {error.position} is not allowed in YAML"
        ) from None
    except ValueError as error:  # an integer of thousands of digits
        raise YamlError(str(error)) from None


def dump(tree: dict[str, Any]) -> str:
    """``tree`` as text that ``parse`` reads back to the same value."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=mark)
