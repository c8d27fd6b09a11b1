"""The samples that a config's folders and files hold: tokenized before, or conversations and text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from portmoe.config import Config
from portmoe.data.sources.conversations import TRUNCATED, Conversations
from portmoe.data.sources.named import named_files
from portmoe.data.sources.sample import DATA_TYPES, Samples
from portmoe.data.sources.tokenized import open_folder
from portmoe.data.text import documents
from portmoe.data.tokenizing.cache import Told, quiet, tokenized
from portmoe.data.tokenizing.recipe import Recipe
from portmoe.errors import ConfigError

Split = Literal["train", "valid"]


@dataclass(frozen=True)
class Opened:
    """The samples of a split.

    Attributes:
        said: what was left out, and what there is to know, in lines; empty: nothing.
    """

    samples: Sequence[Samples]
    said: tuple[str, ...] = ()


def folders(config: Config, split: Split) -> list[str]:
    """What ``data.train_folder`` or ``data.valid_folder`` names."""
    given = getattr(config.data, f"{split}_folder")
    return given if isinstance(given, list) else [given] if given is not None else []


def open_samples(config: Config, split: Split, told: Told = quiet) -> Opened:
    """Open what ``data.train_folder`` or ``data.valid_folder`` names, tokenizing it where that was not done.

    Raises:
        ConfigError: something cannot be read or used, or is bad where ``data.on_bad_sample`` says error.
        BackendError: a package is missing.
    """
    data, key, given = config.data, f"data.{split}_folder", folders(config, split)
    if _are_tokenized(config, given):
        return Opened(open_folder(given[0], key, data.min_length))
    tokenizer = data.tokenizer or config.model.from_pretrained
    sources, said = [], []
    for name in given:
        files, passed_over = named_files(name, key, data.format)
        sources.append(files)
        said += passed_over
    if tokenizer is None:
        raise ConfigError(
            f"{key}={', '.join(given)} is text or conversations, which need a tokenizer: set data.tokenizer "
            "to a folder with one (for text alone also to bytes), or model.from_pretrained to a model's; or "
            f"make a data set of text by `portmoe data tokenize {given[0]} --tokenizer bytes -o FOLDER` and "
            f"set {key} to it"
        )
    of_the_model = "data.tokenizer=null, which is that of model.from_pretrained:"
    where = "data.tokenizer" if data.tokenizer else of_the_model
    recipe = Recipe(tokenizer, data.chat_template, data.train_on, where)
    samples = [
        Conversations(tokenized(recipe, files, data.cache_folder, told), files, data.seq_len, number)
        for number, files in enumerate(sources)
    ]
    said += [line for one in samples for line in _said(key, one)]
    bad = any(one.bad or TRUNCATED in one.notes for one in samples)
    if bad and data.on_bad_sample == "error":
        raise ConfigError("\n".join((*said, "data.on_bad_sample=error: mend them, or set it to skip")))
    if not any(map(len, samples)):
        raise ConfigError("\n".join((*said, f"{key}={given}: no sample is left to learn from")))
    return Opened(samples, tuple(said))


def _said(key: str, samples: Conversations) -> list[str]:
    lines = []
    if samples.bad:
        count = sum(entry["count"] for entry in samples.bad.values())
        lines.append(f"{key}: {count:,} of {samples.records:,} records are left out:")
        lines += [f"  {line}" for line in samples.said(samples.bad)]
    if samples.notes:
        lines.append(f"{key}: kept, and worth knowing:")
        lines += [f"  {line}" for line in samples.said(samples.notes)]
    return lines


def type_names(config: Config, split: Split) -> tuple[str, ...]:
    """The names of the sources of a split, which ``type_id`` of their samples counts.

    Each is the last part of what names the source, numbered where several are alike.
    """
    given = folders(config, split)
    if not given or _are_tokenized(config, given):
        return DATA_TYPES
    names: list[str] = []
    for name in given:
        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(name).resolve().stem)
        alike = sum(1 for other in names if other.partition("#")[0] == stem)
        names.append(f"{stem}#{alike + 1}" if alike else stem)
    return tuple(names)


def _are_tokenized(config: Config, given: Sequence[str]) -> bool:
    return config.data.format == "auto" and len(given) == 1 and _is_tokenized(Path(given[0]))


def _is_tokenized(folder: Path) -> bool:
    """Whether it is a folder with a ``.bin`` file, or with no known one, which is said as of those."""
    if not folder.is_dir():
        return not folder.exists()
    endings = {path.suffix.lower() for path in folder.rglob("*")}
    return ".bin" in endings or not endings & set(documents.READERS)
