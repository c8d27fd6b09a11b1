"""What a folder of the hub has beside its weights, kept in the run directory from the run's start.

The folders that it comes from may be gone, or be others, by the time the weights are exported.
"""

import shutil
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from portmoe.checkpoint.hub_files import NAMES, HubFolder
from portmoe.checkpoint.upkeep import clear
from portmoe.config import Config
from portmoe.data.chat.template import OWN
from portmoe.data.text.tokenizer import BYTES
from portmoe.files import json_object, json_text, write_whole
from portmoe.generation.conversation import Conversation, open_conversation

KEPT = "pretrained"  # in a run directory
KEPT_DTYPES = "dtypes.json"
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
OF_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*"),
    *("*.model", "*.tiktoken"),
)
BESIDE = ("config.json", GENERATION, "*.py", "LICENSE*", "NOTICE*", *OF_TOKENIZER)  # code: as text


def keep(config: Config, run: Path, folder: HubFolder | None) -> None:
    """Copy what an export will carry over into the run directory ``run``.

    Where ``data.tokenizer`` or ``data.chat_template`` name others than the model's own, those are kept, and
    what ends an answer then.

    Args:
        folder: of ``model.from_pretrained``.

    Raises:
        ConfigError: the tokenizer or the template cannot be read.
        BackendError: a package that reads it is missing.
        OSError: a file cannot be copied.
    """
    kept = run / KEPT
    clear(kept)  # another run may have been here
    own_tokenizer, own_template = config.data.tokenizer is None, config.data.chat_template == OWN
    if folder is not None:
        kept.mkdir()
        _copy(_files(folder.path, BESIDE), kept)
        dtypes = {name: NAMES[array.dtype] for name, array in folder.tensors.items()}
        ((most, _),) = Counter(dtypes.values()).most_common(1)
        others = {name: dtype for name, dtype in dtypes.items() if dtype != most}
        write_whole(kept / KEPT_DTYPES, json_text({"most": most, "others": others}, indent=1))
    if config.data.tokenizer == BYTES or (own_tokenizer and (own_template or folder is None)):
        return
    kept.mkdir(exist_ok=True)
    if not own_tokenizer:
        for path in _files(kept, OF_TOKENIZER):
            path.unlink()
        given = Path(config.data.tokenizer)
        _copy(_files(given if given.is_dir() else given.parent, OF_TOKENIZER), kept)
    conversation = open_conversation(config)
    if not own_template:
        write_whole(kept / TEMPLATE, conversation.template_text)
    settings = json_object(kept / GENERATION) | _ends(conversation)
    write_whole(kept / GENERATION, json_text(settings, indent=2) + "\n")


def kept_files(run: Path) -> dict[str, Path]:
    """What was kept, by name."""
    kept = run / KEPT
    return {path.name: path for path in sorted(kept.iterdir())} if kept.is_dir() else {}


def token_ids(run: Path) -> dict[str, Any]:
    """The ids of special tokens, as config.json has them too."""
    found = json_object(run / KEPT / GENERATION)
    return {key: found[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in found}


def _ends(conversation: Conversation) -> dict[str, Any]:
    ends = sorted(conversation.ends)
    ids = {"bos_token_id": conversation.begin, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    return {key: value for key, value in ids.items() if value is not None}


def _files(folder: Path, patterns: Collection[str]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _copy(files: Iterable[Path], to: Path) -> None:
    for path in files:
        shutil.copyfile(path, to / path.name)
