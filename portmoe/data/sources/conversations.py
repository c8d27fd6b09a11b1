"""Samples that were tokenized into the cache: mapped into memory, and read when asked for."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from portmoe.data.sources.sample import Sample
from portmoe.data.text.parts import where
from portmoe.data.tokenizing.cache import Tokenized
from portmoe.data.tokenizing.part import LEARNED, SHOWN, TOKEN, tokens_file
from portmoe.data.tokenizing.recipe import TEXT, Given

OVERLONG, TRUNCATED = "over-long", "truncated"


class Conversations:
    """The samples of one source, none longer than ``seq_len``.

    A conversation is cut behind ``seq_len`` tokens, and left out where none of those is learned; a document
    becomes pieces of ``seq_len`` tokens. ``type_id`` is the source's number, ``lengths`` as ``Samples`` has
    it.

    ``bad``, ``notes``: what was left out, and what is worth a word: see ``tokenizing.cache.Tokenized``.
    """

    def __init__(self, made: Tokenized, given: Sequence[Given], seq_len: int, type_id: int) -> None:
        index = made.index
        self.type_id, self.records, self._made, self._given = type_id, made.records, made, given
        self.bad, self.notes = dict(made.bad), dict(made.notes)
        text_F = np.array([one.form == TEXT for one in given])
        document_S = text_F[index[:, 4]]
        long_S = (index[:, 2] > seq_len) & ~document_S
        lost_S = long_S & (index[:, 3] >= seq_len)
        limit = f"data.seq_len={seq_len}"
        self._add(self.bad, OVERLONG, lost_S, f"none of its first {limit} tokens is learned")
        self._add(self.notes, TRUNCATED, long_S & ~lost_S, f"its end, behind {limit} tokens, is cut off")
        kept = np.flatnonzero(~lost_S)
        pieces = np.where(document_S[kept], -(-index[kept, 2] // seq_len), 1)
        self._row = np.repeat(kept, pieces)
        self._piece = np.arange(len(self._row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._seq_len = seq_len
        self.lengths = np.minimum(index[self._row, 2] - self._piece * seq_len, seq_len)
        self._tokens: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> Sample:
        """Return one sample."""
        row, length = self._made.index[self._row[index]], int(self.lengths[index])
        first = int(row[1]) + int(self._piece[index]) * self._seq_len
        words_T = self._part(int(row[0]))[first : first + length]
        return Sample((words_T & TOKEN).astype(np.int64), (words_T & LEARNED) != 0)

    def place(self, index: int) -> str:
        """Where a sample comes from, in words."""
        file, place = self._made.index[self._row[index], 4:].tolist()
        return where(self._given[file].path, place)

    def said(self, found: dict[str, Any]) -> list[str]:
        """What was counted in ``bad`` or ``notes``, a line a kind and one for each of the first ones."""
        lines = []
        for kind, entry in sorted(found.items(), key=lambda item: -item[1]["count"]):
            lines.append(f"{entry['count']:,} × {kind}")
            for file, place, detail in entry["first"]:
                lines.append(f"  {where(self._given[file].path, place)}: {detail}")
        return lines

    def _part(self, number: int) -> np.ndarray:
        if number not in self._tokens:
            file = tokens_file(self._made.folder, number)
            self._tokens[number] = np.memmap(file, dtype="<u4", mode="r")
        return self._tokens[number]

    def _add(self, found: dict[str, Any], kind: str, which_S: np.ndarray, detail: str) -> None:
        if count := int(which_S.sum()):
            first = self._made.index[np.flatnonzero(which_S)[:SHOWN], 4:].tolist()
            found[kind] = {"count": count, "first": [[*places, detail] for places in first]}
