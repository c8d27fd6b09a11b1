"""A conversation as tokens of its one rendering, and which of them are learned.

The rendering is made once and tokenized once, so that tokens are those of the text as it is; which
characters are learned is known from the template's marks or, without any, from renderings of the
conversation's beginnings, each of which must be how the whole begins. A token is learned that consists of
such characters only: one that reaches over a turn's boundary is not, and is counted.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from portmoe.data.chat.messages import ASSISTANT, BadSample, Message
from portmoe.data.chat.template import ChatTemplate
from portmoe.data.text.tokenizer import FromFile

TrainOn = Literal["assistant", "last_turn", "all"]
Spans = list[tuple[int, int]]

# Why a conversation is left out.
DROPPED, MASK, TWICE = "a turn is left out", "unclear turns", "two begin tokens"
# What is worth knowing of one that is kept.
MERGED = "a token over a turn's boundary"
ENDLESS = "no end token"
SPECIAL = "a special token in a turn's text"


@dataclass(frozen=True)
class Encoded:
    """Tokens, int64, and which are learned, bool.

    Attributes:
        text: of a conversation: its rendering.
        notes: what there is to know of it, by kind.
    """

    tokens_T: np.ndarray
    learned_T: np.ndarray
    text: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def all_learned(cls, tokens: Sequence[int]) -> "Encoded":
        """Tokens of which every one is learned."""
        tokens_T = np.array(tokens, dtype=np.int64)
        return cls(tokens_T, np.ones(len(tokens_T), dtype=np.bool_))


class ChatEncoder:
    """Makes tokens of conversations by one tokenizer and one template."""

    def __init__(self, tokenizer: FromFile, template: ChatTemplate, train_on: TrainOn) -> None:
        self._tokenizer, self._template, self._train_on = tokenizer, template, train_on
        added = tokenizer.fast.get_added_tokens_decoder()
        self._added = np.array(sorted(added), dtype=np.int64)
        texts = sorted((re.escape(token.content) for token in added.values() if token.special), reverse=True)
        self._special = re.compile("|".join(texts)) if texts else None
        self._begin = tokenizer.special.get("bos_token")

    def encode(self, turns: Sequence[Message]) -> Encoded:
        """The tokens of one conversation.

        Raises:
            BadSample: the template refuses it or leaves out a turn, or it is not clear what is learned.
        """
        text, marked = self._template.marked(turns)
        spans = marked if self._template.marks else self._from_prefixes(text, turns)
        self._check(text, turns, spans)
        encoding = self._tokenizer.fast.encode(text, add_special_tokens=False)
        tokens_T = np.array(encoding.ids, dtype=np.int64)
        begins_T, ends_T = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        notes: dict[str, str] = {}
        learned_T = np.zeros(len(tokens_T), dtype=np.bool_)
        added_T = np.isin(tokens_T, self._added)
        for begin, end in self._chosen(turns, spans):
            if not self._template.marks:
                end = self._without_separator(text, begin, end, ends_T[added_T])
            inside_T = (begins_T >= begin) & (ends_T <= end) & (begins_T < end)
            crossing_T = (begins_T < end) & (ends_T > begin) & ~inside_T
            if crossing_T.any():
                across = text[begins_T[crossing_T][0] : ends_T[crossing_T][0]]
                notes[MERGED] = f"{across!r} is one token and not learned"
            if not inside_T.any() or not added_T[inside_T][-1]:
                notes[ENDLESS] = f"the assistant's turn ends with {text[max(begin, end - 12) : end]!r}"
            learned_T |= inside_T
        if self._train_on == "all":
            learned_T[:] = True
        if self._special and (
            found := next(filter(None, (self._special.search(t.content) for t in turns)), None)
        ):
            notes[SPECIAL] = f"{found.group()!r} becomes the special token"
        return Encoded(tokens_T, learned_T, text, notes)

    def _from_prefixes(self, text: str, turns: Sequence[Message]) -> Spans:
        """Of each turn of the assistant: from the end of what it answers to the end with its answer."""
        spans = []
        for number, turn in enumerate(turns):
            if turn.role != ASSISTANT:
                continue
            try:
                before = self._template.render(turns[:number], prompt=True)
                after = text if number + 1 == len(turns) else self._template.render(turns[: number + 1])
            except BadSample:  # it takes the whole, and not this beginning
                before = after = ""
            if text.startswith(before) and text.startswith(after) and len(after) > len(before):
                spans.append((len(before), len(after)))
            else:
                spans.append((0, 0))
        return spans

    def _check(self, text: str, turns: Sequence[Message], spans: Spans) -> None:
        """Nothing is left out, and each turn of the assistant that is learned is where it is taken to be."""
        if self._begin and text.startswith(2 * self._begin) and not turns[0].content.startswith(self._begin):
            raise BadSample(TWICE, "the chat template writes the begin token twice")
        at = 0
        for turn in turns:
            if turn.role != ASSISTANT:
                said = turn.content.strip()
                if (found := text.find(said, at)) < 0:
                    raise BadSample(DROPPED, f"the chat template leaves out or changes a turn ({turn.role})")
                at = found + len(said)
        answers = [turn for turn in turns if turn.role == ASSISTANT]
        if len(spans) != len(answers):
            raise BadSample(
                MASK, f"the chat template marks {len(spans)} turns, and {len(answers)} are the assistant's"
            )
        first = len(answers) - 1 if self._train_on == "last_turn" else 0
        for number, (turn, (begin, end)) in enumerate(zip(answers, spans, strict=True)):
            if number >= first and self._train_on != "all" and turn.content.strip() not in text[begin:end]:
                raise BadSample(
                    MASK,
                    f"the assistant's turn {number + 1} is rendered otherwise where others follow, "
                    "so what is to be learned is not clear; a template with "
                    "{% generation %} marks, or data.train_on: last_turn, would say it",
                )

    def _chosen(self, turns: Sequence[Message], spans: Spans) -> Iterator[tuple[int, int]]:
        answers = [turn for turn in turns if turn.role == ASSISTANT]
        pairs = list(zip(answers, spans, strict=True))
        if self._train_on == "last_turn":
            pairs = pairs[-1:]
        return (span for turn, span in pairs if turn.trained)

    @staticmethod
    def _without_separator(text: str, begin: int, end: int, ends_A: np.ndarray) -> int:
        """The end of a turn's last special token, where only space follows: that belongs to the next turn."""
        inside = ends_A[(ends_A > begin) & (ends_A <= end)]
        return int(inside[-1]) if len(inside) and not text[inside[-1] : end].strip() else end
