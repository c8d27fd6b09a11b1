"""Carrying a config of XTuner, a file of Python assignments, over to a YAML config.

Its sections name what is run, by imported classes, and what with. Keys with a counterpart here are carried
over, by the tables beside this; of the others, and of what is code, key, value and reason are told.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from portmoe.config import yaml as config_yaml
from portmoe.config.imported import Imported, LeftOut, not_read
from portmoe.config.literals import Assignments, Lines, Unreadable
from portmoe.config.messages import sections, shorten, violations
from portmoe.config.pretrained import CONFIG, completed
from portmoe.config.read import read_text
from portmoe.config.schema import Config
from portmoe.config.xtuner.tables import (
    DEFAULTS,
    KEYS,
    NAMES,
    NO_SUCH_KEY,
    OTHER_MODEL,
    PUBLISHED,
    SCHEDULES,
    SILENT,
    WHY_NOT,
)
from portmoe.errors import ConfigError

SECTIONS = (
    *("model", "tokenizer", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "strategy"),
    *("custom_hooks", "default_hooks", "env_cfg", "randomness", "visualizer", "log_level", "log_processor"),
    "sequence_parallel_size",
    *("load_from", "resume", "work_dir", "launcher", "val_dataloader", "val_cfg", "val_evaluator"),
)
TRAINED = "SupervisedFinetune"
ZERO3 = (
    "the recipe is started with --deepspeed deepspeed_zero3, which its file does not say: "
    "parallel.zero1.fsdp is true; set it to false where every card holds the whole model"
)


def is_config(names: Mapping[str, Any]) -> bool:
    """Whether a file that assigns ``names`` is XTuner's."""
    model = names.get("model")
    return bool({"optim_wrapper", "train_dataloader"} & set(names)) or (
        isinstance(model, Lines) and "llm" in model
    )


@dataclass(frozen=True)
class _Leaf:
    path: str  # in their file; an element of a list goes by its type's name
    value: Any
    line: int

    def left_out(self, why: str) -> LeftOut:
        return LeftOut(self.path, _shown(self.value), self.line, why)


def carried_over(source: str, found: Assignments) -> Imported:
    """What the file at ``source`` assigns, as a config of ours.

    Raises:
        ConfigError: a key of ours is computed in a way that is not read, the model is none that is trained
            here, or the keys contradict each other.
    """
    leaves = [leaf for name in SECTIONS if name in found.names for leaf in _leaves(found.names, name)]
    model, notes, left_out = _model(source, leaves)
    ours: dict[str, _Leaf] = {}
    for leaf in leaves:
        key, value, why = _counterpart(leaf)
        if key and why is None:
            ours.setdefault(key, _Leaf(leaf.path, value, leaf.line))
        elif why is not None:
            left_out.append(leaf.left_out(why))
    _add_pairs(ours, leaves, left_out)
    unread = [leaf.value for leaf in ours.values() if isinstance(leaf.value, Unreadable)]
    if unread:
        raise ConfigError(not_read(source, unread))
    left_out += [LeftOut("code", shorten(u.source), u.line, "nothing is executed") for u in found.unread]
    values = {key: leaf.value for key, leaf in ours.items()}
    values = {"JOB_NAME": Path(source).stem} | DEFAULTS | values
    tree = _validated(source, model, values, ours, left_out)
    left_out.sort(key=lambda item: item.line)
    defaults = [f"{key} = {shorten(value)}" for key, value in DEFAULTS.items() if key not in ours]
    if values["parallel.zero1.fsdp"]:
        notes.append(ZERO3)
    return Imported("XTuner", source, tree, left_out, defaults, notes, OTHER_MODEL)


def _leaves(values: Lines, key: str, prefix: str = "") -> Iterator[_Leaf]:
    """Everything below ``key``; of what is called with arguments, its type is a leaf as well."""
    path, value, line = prefix + key, values[key], values.lines[key]
    if path == "param_scheduler" and isinstance(value, Lines):
        value = [value]  # the only one may stand for a list
    if isinstance(value, Lines):
        for inner in value:
            yield from _leaves(value, inner, f"{path}.")
    elif isinstance(value, list) and value and all(isinstance(item, Lines) for item in value):
        for item in value:
            for inner in item:
                yield from _leaves(item, inner, f"{path}.{_name(item.get('type'))}.")
    else:
        yield _Leaf(path, value, line)


def _name(kind: Any) -> str:
    """Of a class or function: as it is imported, or as text."""
    text = (kind.name or kind.source) if isinstance(kind, Unreadable) else str(kind)
    return text.removesuffix(".from_pretrained").rpartition(".")[2]


def _model(source: str, leaves: list[_Leaf]) -> tuple[dict[str, Any], list[str], list[LeftOut]]:
    """model_type and the ``model`` section of ours; notes; what of theirs is not in it."""
    by_path = {leaf.path: leaf for leaf in leaves}
    kind, named = by_path.get("model.type"), by_path.get("model.llm.pretrained_model_name_or_path")
    if kind is not None and _name(kind.value) != TRAINED:
        raise ConfigError(
            f"{source}: line {kind.line}: model.type = {_name(kind.value)}: portmoe trains language models "
            f"({TRAINED}); give a config of one"
        )
    if named is None:
        raise ConfigError(
            f"{source}: model.llm names no pretrained_model_name_or_path; give the model's folder there"
        )
    if isinstance(named.value, Unreadable):
        raise ConfigError(not_read(source, [named.value]))
    if (Path(str(named.value)) / CONFIG).is_file():
        return {"model": {"from_pretrained": named.value}}, [], []
    packaged = PUBLISHED.get(Path(str(named.value)).name.lower())
    if packaged is None:
        raise ConfigError(
            f"{source}: line {named.line}: pretrained_model_name_or_path = {shorten(named.value)}: neither a "
            f"folder with {CONFIG} here nor the name of a model whose sizes are known; give the folder it is "
            f"downloaded to, or one of {', '.join(PUBLISHED)}"
        )
    sizes = config_yaml.parse(read_text(packaged))
    tree = {"model_type": sizes["model_type"], "model": sizes["model"]}
    note = (
        f"the sizes are {packaged}'s; for the weights set model.from_pretrained to a folder of {named.value}"
    )
    return tree, [note], [named.left_out("no folder here: training would start from fresh weights")]


def _counterpart(leaf: _Leaf) -> tuple[str | None, Any, str | None]:
    """(key of ours, its value, why it is left out); all None for what nobody needs to know."""
    path = _of_any_data_set(leaf.path)
    key, value = KEYS.get(path), leaf.value
    if key is not None:
        names = NAMES.get(key)
        if names is not None and isinstance(value, Unreadable):
            value = names.get(_name(value), value)
            if isinstance(value, Unreadable):
                return None, None, f"this is code; {key} knows {', '.join(dict.fromkeys(names.values()))}"
        if key == "data.packing" and isinstance(value, bool):
            value = "cut" if value else "none"
        if key == "data.format" and value is None:
            value = "xtuner"  # their own, which needs no mapping
        if key == "ckpt.keep" and value == -1:
            return None, None, "only so many checkpoints are kept; set ckpt.keep"
        if key == "run.seed" and value is None:
            return None, None, None
        return key, value, None
    if path == "model.llm.pretrained_model_name_or_path" or path.endswith("optimizer.betas"):
        return None, None, None
    if (path == "optim_wrapper.loss_scale" and value == "dynamic") or value in (None, False):
        return None, None, None
    if path.endswith(".type") or path.startswith(tuple(SILENT)):
        return None, None, _of_type(path, value)
    if path.startswith("param_scheduler."):
        _, kind, inner = path.split(".", 2)
        if kind in SCHEDULES and inner in ("begin", "end", "by_epoch", "convert_to_iter_based", "T_max"):
            return None, None, None
    why = next((why for prefix, why in WHY_NOT.items() if f"{path}.".startswith(f"{prefix}.")), NO_SUCH_KEY)
    return None, None, why


def _of_type(path: str, value: Any) -> str | None:
    """Why what is called there is another than here; None where it is not."""
    name = _name(value)
    if path == "optim_wrapper.optimizer.type" and name != "AdamW":
        return "the optimizer is AdamW"
    if path.startswith("param_scheduler.") and name not in SCHEDULES:
        return "the learning rate has a linear warm-up and a cosine"
    return None


def _of_any_data_set(path: str) -> str:
    """The path of a data set's key, also where several are concatenated."""
    head, inner = "train_dataloader.dataset.", path.partition(".datasets.")[2]
    return head + inner.partition(".")[2] if path.startswith(head) and inner else path


def _add_pairs(ours: dict[str, _Leaf], leaves: list[_Leaf], left_out: list[LeftOut]) -> None:
    """What several keys of theirs say together: betas, and how long the warm-up is."""
    by_path = {leaf.path: leaf for leaf in leaves}
    betas = by_path.get("optim_wrapper.optimizer.betas")
    if betas is not None and isinstance(betas.value, list) and len(betas.value) == 2:
        for number, value in enumerate(betas.value, 1):
            ours[f"adam.adam_beta{number}"] = _Leaf(betas.path, value, betas.line)
    elif betas is not None:
        ours["adam.adam_beta1"] = betas
    end = by_path.get("param_scheduler.LinearLR.end")
    if end is None:
        return
    epochs = by_path.get("train_cfg.max_epochs") or by_path.get("train_cfg.max_iters")
    numbers = [
        leaf.value for leaf in (end, epochs) if leaf is not None and isinstance(leaf.value, int | float)
    ]
    if len(numbers) == 2 and 0 <= numbers[0] <= numbers[1] > 0:
        ours["lr_scheduler.warmup_ratio"] = _Leaf(end.path, numbers[0] / numbers[1], end.line)
    else:
        left_out.append(end.left_out("the share of all steps is not known; set lr_scheduler.warmup_ratio"))


def _validated(
    source: str,
    model: Mapping[str, Any],
    values: dict[str, Any],
    ours: dict[str, _Leaf],
    left_out: list[LeftOut],
) -> dict[str, Any]:
    """The values as a tree that the config accepts; refused ones of theirs move to ``left_out``."""
    known = dict(sections(model_type=model.get("model_type", "mixtral")))
    for key in list(values):
        section, _, name = key.rpartition(".")
        if section not in known or name not in known[section].model_fields:
            leaf = ours.pop(key)
            left_out.append(leaf.left_out(WHY_NOT.get(leaf.path, NO_SUCH_KEY)))
            del values[key]
    while True:
        tree = _tree(model, values)
        try:
            Config.model_validate(completed(tree))
        except ValidationError as error:
            found = violations(error, tree)
        else:
            return tree
        refused = {v.path: v.reason for v in found if v.path in ours}
        if not refused:
            raise ConfigError(f"{source}: " + "\n  ".join(v.message for v in found))
        for key, reason in refused.items():
            left_out.append(ours.pop(key).left_out(reason))
            del values[key]


def _tree(model: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {"JOB_NAME": values["JOB_NAME"]} | {
        key: dict(value) if isinstance(value, dict) else value for key, value in model.items()
    }
    for path, value in values.items():
        *outer, key = path.split(".")
        section = tree
        for name in outer:
            section = section.setdefault(name, {})
        section[key] = value
    return tree


def _shown(value: Any) -> str:
    return shorten(value.name or value.source) if isinstance(value, Unreadable) else shorten(value)
