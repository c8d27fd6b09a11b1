"""Text to tokens: by bytes, which needs nothing, or by a tokenizer of the hub's format."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from portmoe.errors import BackendError, ConfigError
from portmoe.files import json_object

BYTES = "bytes"
FILE, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
OTHERS = (SETTINGS, "tokenizer.model", "vocab.json", "vocab.txt")  # files of tokenizers without a FILE


class Tokenizer(Protocol):
    """What making a data set needs of a tokenizer."""

    vocabulary: int  # tokens are below it
    end: int | None  # stands after a document; None: the tokenizer has no such token
    identity: str  # equal for tokenizers that give the same tokens

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text``, without any that mark its beginning or end."""
        ...


class Bytes:
    """A token a byte of UTF-8, three above its value: 0 is padding, 1 ends a document, 2 is unused.

    Source of the numbers: ByT5 (Xue et al. 2022).
    """

    vocabulary, end, identity = 259, 1, BYTES

    def encode(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode("utf-8")]


class FromFile:
    """What a ``tokenizer.json`` says; the ``eos_token`` beside it ends a document.

    Attributes:
        fast: the tokenizer itself, a ``tokenizers.Tokenizer``, which adds no token and knows of which
            characters each token is.
        special: the special tokens' texts by name, as "bos_token".
        begin: the token that begins a text, if the tokenizer names one.
    """

    def __init__(self, content: str, special: Mapping[str, str], said: str) -> None:
        try:
            self.fast, self.vocabulary = _parsed(content)
        except ImportError as error:
            raise BackendError(
                f"{said} needs the package tokenizers ({error}); pip install 'portmoe[finetune]'"
            ) from error
        except Exception as error:  # the package raises Exception itself
            raise ConfigError(f"{said} is no {FILE} that can be read: {error!s:.200}") from error
        self.special = special
        self.begin, self.end = map(self._named, ("bos_token", "eos_token"))
        self.identity = f"{hashlib.sha256(content.encode('utf-8')).hexdigest()[:32]} end {self.end}"

    def _named(self, name: str) -> int | None:
        """A special token by its name; None where there is none."""
        text = self.special.get(name)
        return self.fast.token_to_id(text) if text else None

    def encode(self, text: str) -> list[int]:
        return self.fast.encode(text, add_special_tokens=False).ids


@lru_cache(maxsize=2)
def _parsed(content: str) -> tuple[Any, int]:
    """The tokenizer in a file, and its number of tokens; large ones take a good part of a second."""
    from tokenizers import Tokenizer as Fast
    from tokenizers.processors import TemplateProcessing

    fast = Fast.from_str(content)
    # Other processors add tokens, or take spaces from the places of tokens.
    fast.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    fast.no_truncation()
    fast.no_padding()
    return fast, max(fast.get_vocab(with_added_tokens=True).values()) + 1


def open_tokenizer(name: str, key: str = "--tokenizer") -> Tokenizer:
    """The tokenizer called "bytes", or that of a folder or file; ``key`` is where the name was given.

    Raises:
        ConfigError: there is none.
        BackendError: the package that reads it is missing.
    """
    if name == BYTES:
        return Bytes()
    said, path = f"{key} {name!r}", Path(name)
    folder = path if path.is_dir() else path.parent
    file = path / FILE if path.is_dir() else path
    if file.is_file():
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{said} is no {FILE} that can be read: {error!s:.200}") from error
    elif path.is_dir() and any((path / other).is_file() for other in OTHERS):
        content = _converted(path, said)
    else:
        raise ConfigError(
            f"{said}: {str(file)!r} does not exist; give {BYTES}, a folder with a {FILE}, or such a file"
        )
    return FromFile(content, special_tokens(folder), said)


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of the special tokens that the files of a tokenizer name."""
    found: dict[str, str] = {}
    for settings in (json_object(folder / SPECIAL), json_object(folder / SETTINGS)):
        for name, token in settings.items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
    return found


def _converted(folder: Path, said: str) -> str:
    """The ``tokenizer.json`` of a folder with another format, made by transformers, without remote code."""
    stamps = tuple((path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()))
    try:
        return _by_transformers(str(folder), stamps)
    except ImportError as error:
        raise BackendError(
            f"{said} has no {FILE}, and without the package transformers ({error}) none is made of its other "
            "files; pip install 'portmoe[finetune]'"
        ) from error
    except Exception as error:  # whatever a converter meets
        raise ConfigError(
            f"{said} has no {FILE}, and none can be made of its other files ({error!s:.200}); save one with "
            "transformers' save_pretrained where the tokenizer loads, or give another folder"
        ) from error


@lru_cache(maxsize=2)
def _by_transformers(folder: str, stamps: tuple[tuple[str, int], ...]) -> str:
    """What transformers makes of a folder; ``stamps`` tells it from a folder that has changed."""
    from transformers import AutoTokenizer

    made: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return made.backend_tokenizer.to_str()
