"""Carrying a config of InternEvo, a file of Python assignments, over to a YAML config.

Its sections and keys are the benchmark's and therefore ours; what differs is listed in the tables
below. Everything the file says is either in the result or in ``left_out``, with the reason.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from portmoe.config.checks import of_the_data
from portmoe.config.imported import Imported, LeftOut, not_read
from portmoe.config.internevo.defaults import DEFAULTS, DENSE, MODEL_TYPE, SHAPE
from portmoe.config.keys import walk
from portmoe.config.literals import Assignments, Lines, Unreadable
from portmoe.config.messages import sections, shorten, violations
from portmoe.config.schema import Config
from portmoe.errors import ConfigError

# Later releases moved keys between the sections.
MOVED = {"model.top_k": "moe.top_k"}
MOVED_SECTIONS = {"model.moe_layer_kwargs": "moe"}
RENAMED_VALUES = {"model.moe_type": {"MegaBlock-Dropless": "MegaBlock-D"}}
LOCAL = "local:"  # how file names of this machine begin
STORES = ("boto3:", "volc:", "oss2:")

WHY_NOT = {
    "model.num_kv_attention_heads": "every attention head has keys and values of its own",
    "parallel.expert.no_tp": "the experts are cut by parallel.tensor.size like the rest",
    "parallel.expert_weight": "there is one weight parallelism for all parameters",
    "parallel.expert_zero1": "the state of the experts is sharded by parallel.zero1 too",
    "parallel.sequence_parallel": "choose parallel.tensor.mode instead",
    "metric_dtype": "metrics are computed in float32",
}
NO_SUCH_KEY = "portmoe has no such key"
OTHER_CHECKPOINT = "portmoe loads its own checkpoints only; training starts from fresh weights"
NO_STORE = "there is no object store; give a folder of this machine"

_SECTIONS = dict(sections())
OPTIONAL_SECTION = "ckpt.load_ckpt_info"


@dataclass(frozen=True)
class _Leaf:
    path: str
    value: Any
    line: int


def carried_over(source: str, found: Assignments) -> Imported:
    """What the file at ``source`` assigns, as a config of ours.

    Raises:
        ConfigError: a key of ours is computed in a way that is not read, the file configures another type of
            model, or the keys contradict each other.
    """
    if not set(found.names) & set(Config.model_fields):
        raise ConfigError(
            f"{source}: assigns none of the sections of a config, as in model = dict(…); "
            f"known are {', '.join(Config.model_fields)}"
        )
    leaves, left_out = _sorted_out(found.names)
    unread = [*found.unread, *(leaf.value for leaf in leaves if isinstance(leaf.value, Unreadable))]
    if unread:
        raise ConfigError(not_read(source, unread))
    _require_model(source, found.names)
    leaves = _of_one_type(leaves, left_out)
    tree = _validated(source, leaves, left_out)
    left_out.sort(key=lambda item: item.line)
    given = {leaf.path for leaf in leaves if leaf.line} - {item.key for item in left_out}
    return Imported("InternEvo", source, tree, left_out, list(_defaults(tree, given)), _notes(tree))


def _require_model(source: str, names: Lines) -> None:
    """Refuse a ``model`` of which nothing is understood: the file is another program's."""
    model = names.get("model", {})
    known = {f"model.{key}" for key in _SECTIONS["model"].model_fields} | {*WHY_NOT, *MOVED, *MOVED_SECTIONS}
    if model == {} or (isinstance(model, Lines) and any(f"model.{key}" in known for key in model)):
        return
    keys = ", ".join(key.removeprefix("model.") for key in SHAPE)
    raise ConfigError(
        f"{source}: line {names.lines['model']}: model = {_shown(model)}: it has none of the keys of "
        f"InternEvo's models, as {keys}; the file seems to configure another program"
    )


def _of_one_type(leaves: Sequence[_Leaf], left_out: list[LeftOut]) -> list[_Leaf]:
    """Without a ``model_type`` the model is InternEvo's dense one, whatever experts the file names."""
    given = next((leaf for leaf in leaves if leaf.path == "model_type"), None)
    if given is not None and given.value != MODEL_TYPE:
        return list(leaves)
    experts = [leaf for leaf in leaves if leaf.path == "model.num_experts"]
    several = [leaf for leaf in experts if leaf.value != 1]
    left_out += [LeftOut(leaf.path, _shown(leaf.value), leaf.line, DENSE) for leaf in several]
    kept = [leaf for leaf in leaves if leaf not in experts and leaf is not given]
    return [*kept, _Leaf("model_type", MODEL_TYPE, given.line if given else 0)]


def _notes(tree: dict[str, Any]) -> list[str]:
    config = Config.model_validate(tree)
    return [f"{problem}; the file names no data" for problem in of_the_data(config)]


def _sorted_out(names: Lines) -> tuple[list[_Leaf], list[LeftOut]]:
    """The file's keys that are ours, and the others."""
    ours: dict[str, _Leaf] = {}
    left_out: list[LeftOut] = []
    for leaf in _leaves(names, ""):
        if "." not in leaf.path and leaf.path not in Config.model_fields and _is_constant(leaf.path):
            continue  # a name for the file's own use
        why = _why_not(leaf)
        if why is None and leaf.path in ours and ours[leaf.path].value != leaf.value:
            why = f"line {ours[leaf.path].line} says {_shown(ours[leaf.path].value)}"
        if why is not None:
            left_out.append(LeftOut(leaf.path, _shown(leaf.value), leaf.line, why))
        else:
            ours.setdefault(leaf.path, leaf)
    return list(ours.values()), left_out


def _is_constant(name: str) -> bool:
    return name.upper() == name or name.startswith("_")


def _leaves(values: Lines, prefix: str) -> Iterator[_Leaf]:
    """Every key below ``prefix`` that is no section of ours, under the name it has here."""
    for key, value in values.items():
        path = f"{prefix}.{key}".lstrip(".")
        line = values.lines[key]
        if path in MOVED_SECTIONS and isinstance(value, Lines):
            yield from _leaves(value, MOVED_SECTIONS[path])
        elif path == OPTIONAL_SECTION or path not in _SECTIONS:
            yield _converted(_Leaf(MOVED.get(path, path), value, line))
        elif isinstance(value, Lines):
            yield from _leaves(value, path)
        elif type(value) is int and "size" in _SECTIONS[path].model_fields:
            yield _converted(_Leaf(f"{path}.size", value, line))  # the older form: zero1=8
        else:
            yield _Leaf(path, value, line)


def _converted(leaf: _Leaf) -> _Leaf:
    value = leaf.value
    if isinstance(value, str):
        value = RENAMED_VALUES.get(leaf.path, {}).get(value, value).removeprefix(LOCAL)
    elif leaf.path == "parallel.expert.size" and type(value) is int and value <= 0:
        value = None  # both mean: as many ranks as there are experts, or all
    return _Leaf(leaf.path, value, leaf.line)


def _why_not(leaf: _Leaf) -> str | None:
    """Why a key cannot be in the result whatever else is; None if it may."""
    section, _, key = leaf.path.rpartition(".")
    known = _SECTIONS.get(section)
    if known is None or key not in known.model_fields:
        return WHY_NOT.get(leaf.path, NO_SUCH_KEY)
    if isinstance(leaf.value, str) and leaf.value.startswith(STORES):
        return NO_STORE
    if isinstance(leaf.value, Unreadable) and _is_void(known, key):
        return f"{leaf.value.why}; the key has no effect here"
    if leaf.path == OPTIONAL_SECTION and leaf.value is not None:
        return OTHER_CHECKPOINT
    return None


def _is_void(section: type[BaseModel], key: str) -> bool:
    return any(entry.path == key and entry.key.no_effect for entry in walk(section))


def _validated(source: str, leaves: Sequence[_Leaf], left_out: list[LeftOut]) -> dict[str, Any]:
    """The leaves as a tree that the config accepts; refused ones move to ``left_out``.

    Raises:
        ConfigError: the type of the model is another, or the keys contradict each other.
    """
    kept = {leaf.path: leaf for leaf in leaves}
    absent = [_Leaf(path, value, 0) for path, value in DEFAULTS.items()]
    while True:
        tree = _tree([*(leaf for leaf in absent if leaf.path not in kept), *kept.values()])
        try:
            Config.model_validate(tree)
        except ValidationError as error:
            found = violations(error, tree)
        else:
            return tree
        refused_paths = {v.path for v in found}
        strangers = [leaf for leaf in absent if leaf.path in refused_paths and leaf.path not in kept]
        if strangers:  # defaults of keys that this type of model does not have
            absent = [leaf for leaf in absent if leaf not in strangers]
            continue
        refused = {v.path: v for v in found if v.path in kept}
        if "model_type" in refused or not refused:
            where = "" if "model_type" in refused else "; correct the file and import it again"
            raise ConfigError(f"{source}: " + "\n  ".join(v.message for v in found) + where)
        for path, violation in refused.items():
            leaf = kept.pop(path)
            left_out.append(LeftOut(path, _shown(leaf.value), leaf.line, violation.reason))


def _tree(leaves: Iterator[_Leaf] | Sequence[_Leaf]) -> dict[str, Any]:
    """Nested dicts, in the order of our own config."""
    values = {leaf.path: leaf.value for leaf in leaves}

    def below(model: type[BaseModel], prefix: str) -> dict[str, Any]:
        result = {}
        for name in model.model_fields:
            path = f"{prefix}.{name}".lstrip(".")
            if path in values:
                result[name] = values[path]
            elif path in _SECTIONS and (inner := below(_SECTIONS[path], path)):
                result[name] = inner
        return result

    return below(Config, "")


def _shown(value: Any) -> str:
    if isinstance(value, Unreadable):
        return shorten(value.source)
    return shorten(dict(value) if isinstance(value, Lines) else value)


def _defaults(tree: dict[str, Any], given: set[str]) -> Iterator[str]:
    """The keys that the file does not give and that act, with the values they have then."""
    for entry in walk(Config.model_validate(tree)):
        of_ours = entry.path.partition(".")[0] in ("run", "ops", "trainer")
        if entry.section is None and not entry.key.no_effect and not of_ours and entry.path not in given:
            yield f"{entry.path} = {shorten(entry.value)}"
