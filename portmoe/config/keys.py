"""What is known of a config key beside its type and default, and the one walk over all keys.

The record stands with the key: ``seed: Annotated[int, Key(…)] = 1``. What holds for a section holds for every
key in it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Key:
    """What is known of one key.

    Attributes:
        no_effect: why no value changes anything; None for a key that acts. Such a key is there because
            configs that people have contain it: it is accepted, and reported where it is not the default.
        same_run: two configs that differ in it train the same numbers: where the run lives, how it is laid
            out, computed, watched and saved, and how long it lasts.
        of_the_data: what data there is, which is judged by its content where that is known: the same data may
            lie elsewhere, and other data under the same name.
        asks_for: the operations of which the key, where it is true, asks for a kind of implementation.
    """

    no_effect: str | None = None
    same_run: bool = False
    of_the_data: bool = False
    asks_for: tuple[str, ...] = ()


SAME_RUN = Key(same_run=True)
OF_THE_DATA = Key(of_the_data=True)


def no_effect(why: str) -> Key:
    """Return the record of a key that is kept for compatibility and changes nothing."""
    return Key(no_effect=why, same_run=True)


@dataclass(frozen=True)
class Entry:
    """One key, or one section, of a config or of the type of one.

    Attributes:
        path: with the sections it lies in, as "moe.top_k".
        value: what it is set to; of a type: the default.
        section: its own type where it is a section; None for a key.
    """

    path: str
    key: Key
    value: Any
    default: Any
    section: type[BaseModel] | None


def walk(
    section: BaseModel | type[BaseModel],
    stand_ins: Mapping[type[BaseModel], type[BaseModel]] | None = None,
    prefix: str = "",
    above: Key | None = None,
) -> Iterator[Entry]:
    """Yield every key and section below ``section``, in the order they are declared.

    Args:
        section: a config, whose optional sections are walked where they are set, or its type, all of whose
            sections are walked.
        stand_ins: declared type of a section → the type to walk instead. A config needs none.
    """
    stand_ins = stand_ins or {}
    kind = section if isinstance(section, type) else type(section)
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(section, type):
            value, declared = default, section_in(field.annotation)
            inner = below = stand_ins.get(declared, declared)
        else:
            value = below = getattr(section, name)
            inner = type(value) if isinstance(value, BaseModel) else None
        key = _together(above, next((m for m in field.metadata if isinstance(m, Key)), Key()))
        yield Entry(prefix + name, key, value, default, inner)
        if inner is not None:
            yield from walk(below, stand_ins, f"{prefix}{name}.", key)


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section type in ``annotation``, also where it is optional."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _together(above: Key | None, own: Key) -> Key:
    if above is None:
        return own
    return Key(
        no_effect=own.no_effect or above.no_effect,
        same_run=own.same_run or above.same_run,
        of_the_data=own.of_the_data or above.of_the_data,
        asks_for=own.asks_for,
    )
