"""How the samples of files become tokens: what every process that makes some of them opens."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from portmoe.data.chat.encode import ChatEncoder, Encoded, TrainOn
from portmoe.data.chat.messages import BadSample, messages
from portmoe.data.chat.template import open_template
from portmoe.data.text import documents, records
from portmoe.data.text.parts import Part
from portmoe.data.text.tokenizer import BYTES, Bytes, FromFile, open_tokenizer
from portmoe.errors import ConfigError

VERSION = 1  # of what is made; another one makes all again
LONGEST = 8192  # tokens of a piece of a document, so that reading one stays cheap
TEXT = "text"
BROKEN = "broken"


@dataclass(frozen=True)
class Recipe:
    """The options that tokens depend on, as a config gives them.

    Attributes:
        tokenizer: a folder, a tokenizer.json, or "bytes".
        template: a name or a file; asked for conversations only.
        tokenizer_key: where the tokenizer was given, for messages.
    """

    tokenizer: str
    template: str
    train_on: TrainOn
    tokenizer_key: str = "data.tokenizer"


@dataclass(frozen=True)
class Given:
    """A file and the format of its records."""

    path: Path
    form: str


@dataclass(frozen=True)
class Made:
    """One sample, or why a record is none.

    Attributes:
        tokens_T, learned_T: empty where it is none.
        place: see ``records.Record``.
        bad: kind and detail, where it is none.
        notes: what there is to know of one that is kept, by kind.
    """

    place: int
    encoded: Encoded | None
    bad: tuple[str, str] | None = None
    notes: dict[str, str] = field(default_factory=dict)


class Maker:
    """A recipe with its tokenizer and template open.

    Raises ``ConfigError`` where one of them cannot be used, ``BackendError`` where its package is missing.
    """

    def __init__(self, recipe: Recipe, forms: Sequence[str]) -> None:
        self._tokenizer = open_tokenizer(recipe.tokenizer, recipe.tokenizer_key)
        self._chat: ChatEncoder | None = None
        made_of: list[object] = [VERSION, self._tokenizer.identity]
        if set(forms) - {TEXT}:
            if isinstance(self._tokenizer, Bytes):
                raise ConfigError(
                    f"data.tokenizer={BYTES!r} has no tokens that mark turns, and the data are "
                    "conversations; give the folder of a tokenizer, or train on text"
                )
            assert isinstance(self._tokenizer, FromFile)
            path = Path(recipe.tokenizer)
            folder = path if path.is_dir() else path.parent
            template = open_template(recipe.template, folder, self._tokenizer.special, "data.chat_template")
            self._chat = ChatEncoder(self._tokenizer, template, recipe.train_on)
            made_of += [template.identity, recipe.train_on]
        self.identity = json.dumps(made_of)

    def samples(self, given: Given, part: Part) -> Iterator[Made]:
        """The samples that begin in a part of a file, in order, and why a record is none."""
        return self._documents(part) if given.form == TEXT else self._conversations(given.form, part)

    def _conversations(self, form: str, part: Part) -> Iterator[Made]:
        assert self._chat is not None
        for record in records.records(part):
            if record.value is None:
                yield Made(record.place, None, (BROKEN, record.problem))
                continue
            try:
                encoded = self._chat.encode(messages(record.value, form))
            except BadSample as bad:
                yield Made(record.place, None, (bad.kind, str(bad)))
            else:
                yield Made(record.place, encoded, notes=encoded.notes)

    def _documents(self, part: Part) -> Iterator[Made]:
        """Documents, or pieces of one that are at most ``LONGEST`` tokens long; all tokens are learned."""
        held: list[int] = []
        for piece in documents.read(part):
            if piece.problem:
                yield Made(piece.place, None, (BROKEN, piece.problem))
                continue
            held += self._tokenizer.encode(piece.text)
            if piece.ends and held and self._tokenizer.end is not None:
                held.append(self._tokenizer.end)
            while len(held) > LONGEST or (piece.ends and held):
                yield Made(piece.place, Encoded.all_learned(held[:LONGEST]))
                held = held[LONGEST:]
        if held:
            yield Made(part.start, Encoded.all_learned(held))


def key_of(identity: str, given: Sequence[Given], digests: Sequence[str]) -> str:
    """The name of what a recipe makes of files, by their contents."""
    files = [[one.form, one.path.suffix.lower(), digest] for one, digest in zip(given, digests, strict=True)]
    return hashlib.sha256(json.dumps([identity, files]).encode()).hexdigest()[:32]
