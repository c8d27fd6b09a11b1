"""The families by ``model_type``: each folder here with a ``section`` module is one.

A family's ``section`` has

* ``MODEL_TYPE``: the value of ``model_type`` that names it;
* ``ModelConfig``: its ``model`` section, a ``ModelSection``;
* ``architecture(config)``: the ``Architecture`` of a config of that type;
* ``DEFAULTS``, optional: section → key → the default of a key outside ``model``, where it is another;
* ``contradictions(config)``, optional: a message for each contradiction between its keys and other sections'.

A family with a format on the hub has a module ``hf`` too; its ``HUB`` says how weights and config lie there.
A ``<name>.jinja`` beside it is the chat template that goes by this name, see ``templates``.
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import portmoe.families
from portmoe.config.section import ModelSection
from portmoe.families.hub import Hub

if TYPE_CHECKING:
    from portmoe.config import Config
    from portmoe.families.architecture import Architecture

DEFAULT = "INTERNLM_MoE"


@dataclass(frozen=True)
class Family:
    """One family's entries."""

    model_type: str
    section: type[ModelSection]
    architecture: "Callable[[Config], Architecture]"
    contradictions: "Callable[[Config], Iterator[str]]"
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hub: Hub | None = None  # its format there, where it has one


@cache
def families() -> dict[str, Family]:
    """Every family by its ``model_type``, the default first."""
    found = {}
    for folder in pkgutil.iter_modules(portmoe.families.__path__):
        if folder.ispkg:
            module = import_module(f"{portmoe.families.__name__}.{folder.name}.section")
            family = Family(
                module.MODEL_TYPE,
                module.ModelConfig,
                module.architecture,
                getattr(module, "contradictions", _none),
                getattr(module, "DEFAULTS", {}),
                _hub(folder.name),
            )
            found[family.model_type] = family
    return dict(sorted(found.items(), key=lambda item: (item[0] != DEFAULT, item[0])))


def _hub(folder: str) -> Hub | None:
    name = f"{portmoe.families.__name__}.{folder}.hf"
    return import_module(name).HUB if find_spec(name) else None


def _none(config: "Config") -> "Iterator[str]":
    return iter(())
