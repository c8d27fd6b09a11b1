"""Samples laid end to end and cut into packs of equal size, one pack per micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

DATA_TYPES = ("en", "cn", "code")  # a type is its index here
IGNORED = -100  # a label that counts neither in the loss nor in the metrics
ORDER_SEED = 1024  # fixed by the benchmark, whatever run.seed is


class Samples(Protocol):
    """What packing needs of a data set."""

    type_id: int  # index into DATA_TYPES
    lengths: np.ndarray  # int64, tokens per sample, each at least 1

    def __getitem__(self, index: int) -> np.ndarray: ...  # int64 tokens


@dataclass(frozen=True)
class Pack:
    """The arrays of one micro-batch, int64; segment i is offsets[i] … offsets[i+1]."""

    tokens_T: np.ndarray
    labels_T: np.ndarray
    positions_T: np.ndarray
    types_T: np.ndarray
    offsets: tuple[int, ...]


class Packing:
    """Packs of ``pack_len`` tokens, a multiple of ``seq_len``, made from one data set.

    The samples, shuffled by ``RandomState(1024)``, are laid end to end; pack p is the tokens
    p·pack_len … (p+1)·pack_len, and the rest that fills no pack is left out. A segment is the part
    of one sample inside one pack, or, where that part is longer than ``seq_len``, each piece of
    ``seq_len`` tokens of it. Positions restart at 0 in every segment. A token's label is the next
    token of its sample, also where a piece or the pack ends between the two; the last token of a
    sample has none. A token ≤ 0 is never a label: a negative token is read as its absolute value
    and marks what is not to be learned. Source: the benchmark.
    """

    def __init__(self, samples: Samples, seq_len: int, pack_len: int) -> None:
        self._samples = samples
        self._seq_len = seq_len
        self._pack_len = pack_len
        self._order = np.arange(len(samples.lengths))
        np.random.RandomState(ORDER_SEED).shuffle(self._order)
        self._ends = np.cumsum(samples.lengths[self._order])
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0

    def __len__(self) -> int:
        return self.num_tokens // self._pack_len

    @property
    def equal_segments(self) -> bool:
        """True where every segment of every pack has exactly ``seq_len`` tokens."""
        return not (self._samples.lengths % self._seq_len).any()

    def pack(self, index: int) -> Pack:
        """Build one pack; touches only the samples that lie in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        start, stop = index * self._pack_len, (index + 1) * self._pack_len
        tokens, following, offsets = [], [], [0]
        place = int(np.searchsorted(self._ends, start, side="right"))
        while offsets[-1] < self._pack_len:
            sample = self._samples[self._order[place]]
            first = int(self._ends[place]) - len(sample)  # where the sample begins among all tokens
            begin, end = max(start - first, 0), min(stop - first, len(sample))
            tokens.append(sample[begin:end])
            following.append(sample[begin + 1 : end + 1])
            if end == len(sample):
                following.append(np.full(1, IGNORED))
            filled = offsets[-1]
            offsets += range(filled + self._seq_len, filled + end - begin, self._seq_len)
            offsets.append(filled + end - begin)
            place += 1
        following_T = np.concatenate(following)
        return Pack(
            tokens_T=np.abs(np.concatenate(tokens)),
            labels_T=np.where(following_T > 0, following_T, IGNORED),
            positions_T=np.arange(self._pack_len) - np.repeat(offsets[:-1], np.diff(offsets)),
            types_T=np.full(self._pack_len, self._samples.type_id),
            offsets=tuple(offsets),
        )


class PackSequence:
    """The packs of several data sets, one data set after the other; no pack holds two of them."""

    def __init__(self, packings: Sequence[Packing]) -> None:
        self._packings = packings
        self._ends = np.cumsum([len(packing) for packing in packings])
        self.num_tokens = sum(packing.num_tokens for packing in packings)
        self.equal_segments = all(packing.equal_segments for packing in packings)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def pack(self, index: int) -> Pack:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._packings[which].pack(index - int(self._ends[which]) + len(self._packings[which]))
