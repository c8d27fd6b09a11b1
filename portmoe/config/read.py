"""Reading a config: a file or a packaged name, overrides, and one clear message for any mistake."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from portmoe.config import yaml as config_yaml
from portmoe.config.keys import walk
from portmoe.config.messages import describe, shorten
from portmoe.config.names import FROM_FOLDER
from portmoe.config.pretrained import completed
from portmoe.config.schema import Config
from portmoe.config.section import ModelSection
from portmoe.config.void import void
from portmoe.errors import ConfigError
from portmoe.families.registry import families

PACKAGE = "portmoe.configs"
HERE = "${configs}"  # in a config: the folder of the packaged ones


def load_config(path_or_packaged_name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with ``overrides`` ("moe.top_k=1", value in YAML) applied in order.

    A name that is no file here is looked up among the packaged configs, with or without ".yaml".

    Raises:
        ConfigError: the file cannot be read, is no YAML, or its content (after the overrides) is
            not a valid config; the message lists every problem found.
    """
    source = str(path_or_packaged_name)
    return parse_config(read_text(source), source, overrides)


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """Return the config in a file's content, as ``load_config`` does; ``source`` is its name in messages."""
    tree = _parse(text, source)
    if tree is None:
        raise ConfigError(f"{source}: the file is empty; the smallest valid config is {{}}")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{source}: the top level is {shorten(tree)}; it must be sections, as in 'model: …'"
        )
    for override in overrides:
        _apply(tree, override)
    _place(tree)
    tree = completed(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = describe(error, tree)
    where = f"{source} with --set {' --set '.join(map(shorten, overrides))}" if overrides else source
    if len(problems) == 1:
        raise ConfigError(f"{where}: {problems[0]}")
    raise ConfigError(f"{where}: {len(problems)} problems\n  " + "\n  ".join(problems))


def dump_config(config: Config) -> str:
    """Every key of ``config`` as YAML; loading the text gives an equal config."""
    return config_yaml.dump(config.model_dump())


def config_name(path_or_packaged_name: str | Path) -> str:
    """The file's name without folder and ending: what a run directory is named after."""
    return Path(path_or_packaged_name).stem


def packaged_names() -> list[str]:
    """The configs shipped with portmoe."""
    return sorted(entry.name for entry in resources.files(PACKAGE).iterdir() if entry.name.endswith(".yaml"))


def no_effect_notes(config: Config) -> list[str]:
    """A line for every key that is set but changes nothing, at all or beside the others, with the reason."""
    beside_others = void(config)
    of_family = {
        f"{section}.{key}": value
        for section, keys in families()[config.model_type].defaults.items()
        for key, value in keys.items()
    }
    return [
        f"{entry.path} = {shorten(entry.value)} has no effect: {why}"
        for entry in walk(config)
        if entry.section is None
        and entry.value != of_family.get(entry.path, entry.default)
        and (why := entry.key.no_effect or beside_others.get(entry.path))
    ]


def default_model(config: Config) -> list[str]:
    """A line that says which model is meant where the config says nothing of it; none where it does."""
    if config.model.model_fields_set - ModelSection.model_fields.keys():
        return []
    model = config.architecture
    networks = f"{model.experts} experts" if model.expert_layers else "no experts"
    return [
        f"no key of this config says what the model is, so the defaults of {config.model_type} hold: "
        f"{len(model.layers)} layers, hidden size {model.hidden}, {networks}; for a small model, give these "
        "keys by --set to the packaged config tiny_moe4"
    ]


def read_text(source: str, packaged: bool = True) -> str:
    """The text of the file at ``source``, else, where ``packaged``, of the packaged config of that name.

    Raises:
        ConfigError: there is none, or it is no text of a config's size.
    """
    if packaged and source == FROM_FOLDER and not Path(source).is_file():
        return "{}"
    try:
        with _open(source, packaged_names() if packaged else []) as stream:
            data = stream.read(config_yaml.MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"config {shorten(source)}: cannot be read: {error.strerror}; give a readable file"
        ) from None
    if len(data) > config_yaml.MAX_BYTES:
        raise ConfigError(
            f"{source}: larger than {config_yaml.MAX_BYTES // 1024} KiB, so it is hardly a config; "
            "give a config"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source}: byte 0x{data[error.start]:02x} at position {error.start} "
            "is not UTF-8; save the file as UTF-8"
        ) from None


def _open(source: str, packaged: Sequence[str]) -> BinaryIO:
    """The file at ``source``, else the packaged config of that name."""
    if "\0" in source:
        raise ConfigError(f"config {shorten(source)}: a file name cannot contain a NUL character")
    path = Path(source)
    if path.is_file():
        return path.open("rb")
    for name in (source, f"{source}.yaml"):
        if name in packaged:
            return (resources.files(PACKAGE) / name).open("rb")
    kind = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "not found"
    names = [name.removesuffix(".yaml") for name in packaged]
    near = get_close_matches(source.removesuffix(".yaml"), names, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    allowed = f"a YAML file or a packaged name: {', '.join(names)}" if names else "a file"
    raise ConfigError(f"config {shorten(source)}: {kind}{guess}; give the path of {allowed}")


def _parse(text: str, source: str) -> Any:
    try:
        return config_yaml.parse(text)
    except config_yaml.YamlError as error:
        raise ConfigError(f"{source}: not a valid config file: {error}") from None


def _place(tree: dict[str, Any]) -> None:
    """Put the folder of the packaged configs in the place of ``HERE`` in paths of ``tree``."""
    nodes: list[Any] = [tree]
    while nodes:  # no recursion: a tree may be deeper than Python lets a function be
        node = nodes.pop()
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(value, dict | list):
                nodes.append(value)
            elif isinstance(value, str) and value.startswith(HERE):
                node[key] = str(resources.files(PACKAGE)) + value.removeprefix(HERE)


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one key of ``tree``, creating sections on the way."""
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    label = f"--set {shorten(override)}"
    if not equals or not all((*sections, name)):
        raise ConfigError(f"{label}: must be KEY=VALUE with the key's full path, as in --set moe.top_k=1")
    for depth, section in enumerate(sections, start=1):
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, Mapping):
            where = ".".join(sections[:depth])
            raise ConfigError(
                f"{label}: {shorten(where)} is {shorten(tree)}, not a section; give the key's full path"
            )
    tree[name] = _parse(text, label)
