"""Folders of the hub as a source of the architecture: ``model.from_pretrained``.

config.json chooses the family and gives every key of the architecture. What portmoe does not know, or does
not do, is refused by name: it might change what the weights mean. Nothing of a folder is ever run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from portmoe.config.messages import describe, shorten
from portmoe.config.names import PRETRAINED as KEY
from portmoe.config.section import ModelSection
from portmoe.config.tree import Tree
from portmoe.errors import ConfigError
from portmoe.families import registry
from portmoe.families.architecture import Architecture
from portmoe.families.hub import Hub
from portmoe.families.registry import Family

CONFIG = "config.json"
AGAIN = "download or convert the folder again"

# Keys that say nothing of what the weights compute in training, with those that begin with "_".
_NOTHING_FOR_TRAINING = """
add_cross_attention architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens
bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label is_decoder
is_encoder_decoder label2id length_penalty max_length max_new_tokens max_window_layers min_length
model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type
remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""
IGNORED = frozenset(_NOTHING_FOR_TRAINING.split())
# Keys that no section has, and what they may be: the value that changes nothing.
NOTHING: Mapping[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "ep_size": (1, None),
}


@dataclass(frozen=True)
class Pretrained:
    """What a folder's config.json says.

    Attributes:
        keys: every key of the architecture, as the family's ``model`` section has it.
        content: config.json as it is.
    """

    folder: Path
    family: Family
    hub: Hub
    keys: Mapping[str, Any]
    content: Mapping[str, Any]


def read_pretrained(folder: str) -> Pretrained:
    """Read a folder's config.json.

    Raises:
        ConfigError: there is none, or it describes a model that portmoe does not train, naming the key.
    """
    path = _folder(folder)
    content = read_json(path / CONFIG)
    family = _family(path, content)
    hub = family.hub
    assert hub is not None
    named = content.get("architectures")
    if named and named != [hub.architecture]:
        raise _refused(path, "architectures", named, f"must be [{hub.architecture!r}]")
    keys, unknown = dict(hub.absent), []
    for key, value in _without_rope(path, content).items():
        name = hub.renamed.get(key, key)
        if not _allowed(hub, key, value, content):
            raise _refused(path, key, value, "is not supported")
        if name in architecture_keys(family):
            keys[name] = value
        elif not (key in hub.fixed or key in NOTHING or key in IGNORED or key.startswith("_")):
            unknown.append(key)
    if unknown:
        named = ", ".join(f"{key} = {shorten(content[key])}" for key in unknown)
        raise ConfigError(
            f"{path / CONFIG}: {named}: not known for model_type {family.model_type!r}, and might change "
            "what the weights mean; remove what changes nothing"
        )
    if missing := [key for key in architecture_keys(family) if key not in keys]:
        raise ConfigError(f"{path / CONFIG} lacks {', '.join(missing)}; {AGAIN}")
    try:
        Tree.model_validate({"model_type": family.model_type, "model": keys})
    except ValidationError as error:
        problems = describe(error, {"model_type": family.model_type, "model": keys})
        where = [problem.removeprefix("model.") for problem in problems]
        raise ConfigError(f"{path / CONFIG}: {'; '.join(where)}") from None
    return Pretrained(path, family, hub, keys, content)


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """``tree``, the content of a config, with what the folder of ``model.from_pretrained`` says.

    A tree that says it all already, as that of a run directory, needs no folder any more.

    Raises:
        ConfigError: the folder cannot be used, or a key given beside it is of another model.
    """
    model = tree.get("model")
    folder = model.get("from_pretrained") if isinstance(model, Mapping) else None
    if not isinstance(folder, str) or not folder:
        return tree
    if _is_complete(tree) and not _is_there(folder):
        return tree
    found = read_pretrained(folder)
    model_type = found.family.model_type
    if tree.get("model_type", model_type) != model_type:
        raise ConfigError(
            f"model_type={shorten(tree['model_type'])}, and {found.folder / CONFIG} says {model_type!r}; "
            "leave it out, or give the folder of such a model"
        )
    others = [
        f"model.{key}={shorten(value)}, and {found.folder / CONFIG} has {shorten(found.keys[key])}"
        for key, value in model.items()
        if key in found.keys and value != found.keys[key] and not _same(found, key, value)
    ]
    if others:
        raise ConfigError(f"{'; '.join(others)}; leave out what the folder gives")
    return {**tree, "model_type": model_type, "model": {**found.keys, **model}}


def architecture_keys(family: Family) -> list[str]:
    """The keys of a family's ``model`` section that say what the model is."""
    return [key for key in family.section.model_fields if key not in ModelSection.model_fields]


def _allowed(hub: Hub, key: str, value: Any, content: Mapping[str, Any]) -> bool:
    """Whether this value of a key of ``content`` is one that is trained here, as far as no section knows."""
    if key not in hub.fixed:
        return value in NOTHING.get(key, (value,))
    try:
        return hub.fixed[key](value, content)
    except TypeError:  # text in place of a number, here or in another key
        return False


def _is_there(folder: str) -> bool:
    try:
        return (Path(folder).expanduser() / CONFIG).is_file()
    except (RuntimeError, ValueError, OSError):
        return False


def _is_complete(tree: Mapping[str, Any]) -> bool:
    model_type = tree.get("model_type", registry.DEFAULT)
    family = registry.families().get(model_type) if isinstance(model_type, str) else None
    return family is not None and all(key in tree["model"] for key in architecture_keys(family))


def _same(found: Pretrained, key: str, value: Any) -> bool:
    """Whether the model is the same with another value of a key, as with null and what null stands for."""
    if key in found.hub.free:
        return True

    def architecture(keys: Mapping[str, Any]) -> Architecture:
        return Tree.model_validate({"model_type": found.family.model_type, "model": keys}).architecture

    try:
        return architecture({**found.keys, key: value}) == architecture(found.keys)
    except ValidationError:
        return False


def _folder(given: str) -> Path:
    try:
        path = Path(given).expanduser()
        if path.is_dir():
            return path
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"{KEY}={given!r}: {error}; give the path of a folder") from None
    hint = "; a name on the hub must be downloaded first" if given.count("/") == 1 else ""
    raise ConfigError(f"{KEY}={given!r} is no folder; give one with config.json and safetensors{hint}")


def _family(path: Path, content: Mapping[str, Any]) -> Family:
    model_type = content.get("model_type")
    families = {name: family for name, family in registry.families().items() if family.hub is not None}
    if isinstance(model_type, str) and model_type in families:
        return families[model_type]
    code = "; its own code (auto_map) is never run" if content.get("auto_map") else ""
    raise _refused(path, "model_type", model_type, f"must be one of {', '.join(families)}{code}")


def _refused(path: Path, key: str, value: Any, why: str) -> ConfigError:
    return ConfigError(f"{path / CONFIG}: {key} = {shorten(value)}: {why}; give the folder of another model")


def _without_rope(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` with one pair of rotary keys, rope_theta and rope_scaling, whoever wrote it."""
    found = dict(content)
    newer = found.pop("rope_parameters", None)
    scaling = newer if newer is not None else found.get("rope_scaling")
    if scaling is None:
        return found
    if not isinstance(scaling, Mapping):
        raise _refused(path, "rope_scaling", scaling, "must be an object")
    scaling = dict(scaling)
    if "rope_theta" in scaling:
        found["rope_theta"] = scaling.pop("rope_theta")
    kinds = {scaling.pop(key) for key in ("rope_type", "type") if isinstance(scaling.get(key), str)}
    kind = next(iter(kinds), None)
    if len(kinds) > 1 or kind not in ("yarn", "default"):
        what = " and ".join(map(repr, sorted(kinds))) or "none"
        raise _refused(path, "the rotary embedding's type", what, "must be 'yarn' or 'default'")
    found["rope_scaling"] = {"type": "yarn", **scaling} if kind == "yarn" else None
    if kind == "default" and scaling:
        raise _refused(
            path, "rope_parameters", newer or content["rope_scaling"], "scales nothing with these keys"
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the one object in a file.

    Raises:
        ConfigError: there is none.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=once)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give a folder with it") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}; {AGAIN}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold one JSON object; {AGAIN}")
    return content


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs; a name that is there twice is a mistake."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found
