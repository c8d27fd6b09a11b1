"""Text to tokens: by bytes, which needs nothing, or by a tokenizer of the hub's format."""

import hashlib
import json
from pathlib import Path
from typing import Protocol

from portmoe.errors import BackendError, ConfigError

BYTES = "bytes"


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
    """A ``tokenizer.json``; the ``eos_token`` in ``tokenizer_config.json`` beside it ends a document."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError as error:
            raise BackendError(
                f"--tokenizer {str(path)!r} needs the package tokenizers ({error}); pip install tokenizers, "
                f"or use --tokenizer {BYTES}"
            ) from error
        try:
            content = path.read_bytes()
            self._fast = Fast.from_str(content.decode("utf-8"))
        except Exception as error:  # the package raises Exception itself
            raise ConfigError(
                f"{str(path)!r} is no tokenizer.json that can be read: {error!s:.200}"
            ) from error
        name = _end_token(path.with_name("tokenizer_config.json"))
        self.end = self._fast.token_to_id(name) if name else None
        self.vocabulary = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        self.identity = f"{hashlib.sha256(content).hexdigest()[:32]} end {self.end}"

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called "bytes", or that of a folder or file.

    Raises:
        ConfigError: there is none.
        BackendError: the package that reads it is missing.
    """
    if name == BYTES:
        return Bytes()
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"--tokenizer {name!r}: {str(path)!r} does not exist; give {BYTES}, a folder with a "
            "tokenizer.json, or such a file"
        )
    return FromFile(path)


def _end_token(config: Path) -> str | None:
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
