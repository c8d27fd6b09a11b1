"""Turning violations of the typed config into messages: key, value, what is allowed, the fix."""

import difflib
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from portmoe.config.keys import walk
from portmoe.config.schema import Config
from portmoe.config.section import LARGEST, LARGEST_FLOAT, LARGEST_SIZE, ModelSection
from portmoe.families import registry

_POWERS = {LARGEST: "2^40", LARGEST_SIZE: "2^24", LARGEST_FLOAT: "2^127"}  # bounds as one writes them

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60
_repr.maxlist = _repr.maxdict = 4
_repr.maxlevel = 2


def shorten(value: Any) -> str:
    """``value`` as the user would recognise it, at most about 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) > 10**40:
        return f"an integer of {int(math.log10(abs(value))) + 1} digits"
    return _repr.repr(value)


def sections(
    config: type[BaseModel] = Config, model_type: str = registry.DEFAULT
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section for ``model_type`` as (dotted path, its type), the top level first with path ""."""
    yield "", config
    for entry in walk(config, _stand_ins(model_type)):
        if entry.section is not None:
            yield entry.path, entry.section


@dataclass(frozen=True)
class Violation:
    """One thing wrong: the key or section, the whole message, and the message without key and value."""

    path: str
    message: str
    reason: str


def describe(error: ValidationError, tree: Mapping[str, Any], config: type[BaseModel] = Config) -> list[str]:
    """One line per offending key of ``tree``, which is no ``config``, in the order found."""
    return [violation.message for violation in violations(error, tree, config)]


def violations(
    error: ValidationError, tree: Mapping[str, Any], config: type[BaseModel] = Config
) -> list[Violation]:
    """Every offending key of ``tree``, which is no ``config``, once, in the order found."""
    found: dict[str, Violation] = {}
    known = dict(sections(config, tree.get("model_type", registry.DEFAULT)))
    for item in error.errors(include_url=False):
        path, section, key = _resolve(item["loc"], known)
        if item["type"] == "extra_forbidden":
            where = ".".join(map(str, item["loc"][:-1]))
            reason = f"unknown key; {_nearest(where, str(key), known)}"
            found.setdefault(path, Violation(path, f"{path:.120}: {reason}", reason))
        elif item["type"] == "value_error":
            for reason in str(item["ctx"]["error"]).splitlines():
                found.setdefault(reason, Violation(path, f"{path}: {reason}" if key else reason, reason))
        else:
            if key is None:
                value, reason = (
                    item["input"],
                    f"must be a section with keys {', '.join(section.model_fields)}",
                )
            else:
                value = _value_at(tree, item["loc"][: path.count(".") + 1])
                reason = _must(section, key, value)
            found.setdefault(path, Violation(path, f"{path} = {shorten(value)}: {reason}", reason))
    return list(found.values())


def _stand_ins(model_type: Any) -> dict[type[BaseModel], type[BaseModel]]:
    """The family's ``model`` section for the one that all share."""
    family = registry.families().get(model_type) if isinstance(model_type, str) else None
    return {ModelSection: family.section} if family else {}


def _resolve(
    loc: tuple[int | str, ...], known: Mapping[str, type[BaseModel]]
) -> tuple[str, type[BaseModel], str | None]:
    """The dotted path in ``loc``, the innermost section on it, and the key there (None: the section itself).

    pydantic appends the tried member of a union and the index in a list; neither is a key.
    """
    path: list[str] = []
    section = ""
    for part in loc:
        path.append(str(part))
        whole = ".".join(path)
        if part not in known[section].model_fields or whole not in known:
            return whole, known[section], str(part)
        section = whole
    return section or "the config", known[section], None


def _value_at(tree: Any, path: tuple[int | str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _nearest(section_path: str, key: str, sections: Mapping[str, type[BaseModel]]) -> str:
    """Where an unknown key of a section was probably meant to go."""
    known = {where: list(section.model_fields) for where, section in sections.items()}
    here = known[section_path]
    elsewhere = [f"{where}.{key}".lstrip(".") for where, names in known.items() if key in names]
    if elsewhere:
        return f"that key is {' or '.join(elsewhere)}"
    close = difflib.get_close_matches(key, here, n=1)
    if close:
        return f"did you mean {f'{section_path}.{close[0]}'.lstrip('.')}?"
    everywhere = {name: where for where, names in known.items() for name in names}
    far = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75)
    if far:
        return f"did you mean {f'{everywhere[far[0]]}.{far[0]}'.lstrip('.')}?"
    return f"remove it; {section_path or 'the top level'} has {', '.join(here)}"


def _must(section: type[BaseModel], key: str, value: Any) -> str:
    """What ``section.key`` accepts, a hint where the type alone is wrong, and the default."""
    schema = section.model_json_schema()
    allowed = _allowed(schema["properties"][key])
    default = section.model_fields[key].get_default(call_default_factory=True)
    if isinstance(value, str) and not isinstance(default, str | None) and not _is_choice(allowed):
        hint = "; write it without quotes" if _looks_like_number(value) else ""
    elif isinstance(value, int | float) and "text" in allowed:
        hint = "; put it in quotes"
    else:
        hint = ""
    return f"must be {allowed}{hint} (default: {shorten(default)})"


def _is_choice(allowed: str) -> bool:
    return allowed.startswith(("one of", "'"))


def _looks_like_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _allowed(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_allowed(option) for option in schema["anyOf"])
    if "const" in schema:
        return shorten(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(shorten(value) for value in schema["enum"])
    match schema.get("type"):
        case "integer" | "number" as kind:
            return ("an integer" if kind == "integer" else "a number") + _bounds(schema)
        case "boolean":
            return "true or false"
        case "array":
            return f"a list, each entry {_allowed(schema['items'])}"
        case "null":
            return "null"
        case "string":
            return "text"
    return "a section"


def _bounds(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    limits = []
    if low is not None and low != -LARGEST:
        limits.append(f"≥ {low:g}")
    if above is not None:
        limits.append(f"> {above:g}")
    if high is not None:
        limits.append(f"≤ {_POWERS.get(high, f'{high:g}')}")
    if below is not None:
        limits.append(f"< {below:g}")
    return " " + " and ".join(limits) if limits else ""
