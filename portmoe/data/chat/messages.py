"""What a record of each format says: the messages of one conversation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: "system", "user" or "assistant".
        trained: false where the record says that this turn of the assistant is not to be learned.
    """

    role: str
    content: str
    trained: bool = True

    def plain(self) -> dict[str, str]:
        """The turn as templates take it."""
        return {"role": self.role, "content": self.content}


class BadSample(Exception):
    """A record that nothing can be learned from as it is.

    Attributes:
        kind: what it is counted as.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


MISSING, ROLE, EMPTY = "missing field", "unknown role", "empty"
ROLES = {  # of all formats: who speaks by what they are called
    **{"system": SYSTEM, "user": USER, "human": USER},
    **{"assistant": ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT},
}


def _alpaca(record: Mapping[str, Any]) -> Iterator[Message]:
    """{instruction, input, output}, and system where it is given."""
    if _given(record, "system"):
        yield Message(SYSTEM, _text(record, "system"))
    asked = [_text(record, name) for name in ("instruction", "input") if _given(record, name)]
    if not any(text.strip() for text in asked):
        _text(record, "instruction")
        raise BadSample(EMPTY, "the instruction is empty")
    yield Message(USER, "\n".join(asked))
    answer = _text(record, "output")
    yield Message(ASSISTANT, "" if answer == "<nooutput>" else answer)


def _sharegpt(record: Mapping[str, Any]) -> Iterator[Message]:
    """{conversations: [{from, value}]}, and system where it is given."""
    if _given(record, "system"):
        yield Message(SYSTEM, _text(record, "system"))
    for turn in _turns(record, "conversations"):
        yield Message(_role(turn, "from"), _text(turn, "value"))


def _openai(record: Mapping[str, Any]) -> Iterator[Message]:
    """{messages: [{role, content}]}; weight 0: not learned."""
    for turn in _turns(record, "messages"):
        yield Message(_role(turn, "role"), _text(turn, "content"), turn.get("weight") != 0)


def _xtuner(record: Mapping[str, Any]) -> Iterator[Message]:
    """{conversation: [{system?, input, output}]}; output_with_loss false: not learned."""
    for turn in _turns(record, "conversation"):
        if _given(turn, "system"):
            yield Message(SYSTEM, _text(turn, "system"))
        yield Message(USER, _text(turn, "input"))
        yield Message(ASSISTANT, _text(turn, "output"), turn.get("output_with_loss") is not False)


FORMATS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Message]]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _openai,
    "xtuner": _xtuner,
}
# A record is of the first format whose field it has.
SIGNS = {
    "messages": "messages",
    "conversations": "sharegpt",
    "conversation": "xtuner",
    "instruction": "alpaca",
    "text": "text",
}


def format_of(record: Mapping[str, Any]) -> str | None:
    """The format that a record is of, by its fields; None: of none."""
    return next((name for field, name in SIGNS.items() if field in record), None)


def messages(record: Mapping[str, Any], form: str) -> list[Message]:
    """The turns of a record in one of the ``FORMATS``.

    Raises:
        BadSample: a field is missing, a role unknown, or a turn empty.
    """
    turns = [turn for turn in FORMATS[form](record) if turn.role != SYSTEM or turn.content.strip()]
    if not turns:
        raise BadSample(EMPTY, "the conversation has no turns")
    for number, turn in enumerate(turns, 1):
        if not turn.content.strip():
            raise BadSample(EMPTY, f"turn {number} ({turn.role}) is empty")
    if not any(turn.role == ASSISTANT for turn in turns):
        raise BadSample(MISSING, "no turn is the assistant's")
    return turns


def _given(record: Mapping[str, Any], name: str) -> bool:
    return record.get(name) not in (None, "")


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if isinstance(value, list):  # a message in pieces
        texts = [piece.get("text") for piece in value if isinstance(piece, dict)]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    if isinstance(value, str):
        return value
    if value is None:
        raise BadSample(MISSING, f"there is no {name!r}; its fields are {', '.join(map(repr, record))}")
    raise BadSample(MISSING, f"{name!r} is {type(value).__name__}, not text")


def _turns(record: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    turns = record.get(name)
    if turns is None:
        raise BadSample(MISSING, f"there is no {name!r}; its fields are {', '.join(map(repr, record))}")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample(MISSING, f"{name!r} is no list of turns")
    return turns


def _role(turn: Mapping[str, Any], name: str) -> str:
    said = _text(turn, name)
    role = ROLES.get(said.lower())
    if role is None:
        raise BadSample(ROLE, f"{name!r} is {said[:40]!r}; known are {', '.join(ROLES)}")
    return role
