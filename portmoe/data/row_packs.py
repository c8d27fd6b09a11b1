"""Rows of samples as micro-batches."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from portmoe.data.pack import Pack
from portmoe.data.rows import PACKINGS
from portmoe.data.sampler import RowSampler
from portmoe.data.sources.sample import Samples

# Padding is cut into segments this long, so that attention over it costs next to nothing.
PADDING_SEGMENT = 128
PADDING_TOKEN = 0


class _Piece(NamedTuple):
    """A part of one sample, as it lies in a row; arrays of its length."""

    tokens: np.ndarray
    labels: np.ndarray
    labelled: np.ndarray
    type_id: int


class RowPacks:
    """The samples of several data sets together, shuffled by the seed and laid into rows of equal length.

    ``width`` rows are a pack. A token's label is the next token of its sample, also where a piece ends
    between the two; the last token of a sample has none, and neither has one before a token that is not
    learned. Padding lies behind all tokens of the micro-batch, has no label, and neither attends to them nor
    they to it.

    Args:
        samples: the data sets, in any kind and number.
        packing: a name in ``rows.PACKINGS``.
        within_samples: positions restart and attention ends with every piece of a sample; else with every
            row. (Labels never cross samples.)
        seed: of the order the samples are laid in, and of the epochs'.
    """

    def __init__(
        self,
        samples: Sequence[Samples],
        packing: str,
        seq_len: int,
        width: int,
        within_samples: bool,
        seed: int,
    ) -> None:
        self._samples = samples
        self._ends = np.cumsum([len(one.lengths) for one in samples])  # of the numbers of each set's samples
        self._within_samples = within_samples
        self._seed = seed
        self.lengths = np.concatenate([np.asarray(one.lengths, np.int64) for one in samples])
        order = np.arange(len(self.lengths))
        np.random.RandomState(seed).shuffle(order)
        self.rows = PACKINGS[packing](self.lengths, seq_len, order)
        self.width = width
        self.num_samples = len(self.lengths)
        self.num_tokens = int(self.lengths.sum())
        self.num_rows = len(self.rows)
        self.padding = self.num_rows * seq_len - self.num_tokens
        self.left_out = 0  # every token lies in a row
        self.divided = int((np.bincount(self.rows.sample_P) > 1).sum())

    def __len__(self) -> int:
        """The number of packs that hold all rows."""
        return -(-self.num_rows // self.width)

    def in_order(self, number: int) -> tuple[int, ...]:
        """Return the rows of pack ``number``, all rows taken in order; the last may have fewer."""
        if not 0 <= number < len(self):
            raise IndexError(f"pack {number} of {len(self)}")
        return tuple(range(number * self.width, min((number + 1) * self.width, self.num_rows)))

    def layout(self) -> tuple[np.ndarray, ...]:
        """Return what says where every sample lies, for a fingerprint."""
        rows = self.rows
        return self.lengths, rows.sample_P, rows.begin_P, rows.end_P, rows.first_R

    @property
    def equal_segments(self) -> bool:
        """True where every segment of every pack has exactly ``seq_len`` tokens, padding aside."""
        rows = self.rows
        lengths = rows.end_P - rows.begin_P if self._within_samples else rows.filled_R
        return bool((lengths == rows.seq_len).all())

    def sampler(self, micro_num: int, rank: int, size: int, num_epochs: int | None) -> RowSampler:
        """Return which rows a data-parallel rank takes at which step."""
        rows = self.rows
        cost_R = rows.attended_R if self._within_samples else np.square(rows.filled_R)
        return RowSampler(cost_R, self.width, micro_num, rank, size, self._seed, num_epochs)

    def pack(self, rows: Sequence[int]) -> Pack:
        """Build the pack of these rows, at most ``width``; touches only the samples that lie in them."""
        of_rows = [list(map(self._piece, self._pieces_of(row))) for row in rows]
        pieces = [piece for row in of_rows for piece in row]
        segments = [[piece] for piece in pieces] if self._within_samples else of_rows
        lengths = [sum(len(piece.tokens) for piece in segment) for segment in segments]
        missing = self.width * self.rows.seq_len - sum(lengths)
        padding = _padding(missing, min(PADDING_SEGMENT, self.rows.seq_len))
        lengths += padding
        ends = np.cumsum(lengths)
        return Pack(
            tokens_T=_joined([piece.tokens for piece in pieces], missing, PADDING_TOKEN, np.int64),
            labels_T=_joined([piece.labels for piece in pieces], missing, 0, np.int64),
            labelled_T=_joined([piece.labelled for piece in pieces], missing, False, np.bool_),
            positions_T=np.arange(ends[-1]) - np.repeat(ends - lengths, lengths),
            types_T=_joined([np.full(len(p.tokens), p.type_id) for p in pieces], missing, 0, np.int64),
            offsets=(0, *accumulate(lengths)),
            padded=len(padding),
        )

    def _pieces_of(self, row: int) -> range:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        return range(int(self.rows.first_R[row]), int(self.rows.first_R[row + 1]))

    def _piece(self, piece: int) -> _Piece:
        rows = self.rows
        number, begin, end = (int(array[piece]) for array in (rows.sample_P, rows.begin_P, rows.end_P))
        which = int(np.searchsorted(self._ends, number, side="right"))
        source = self._samples[which]
        sample = source.sample(number - int(self._ends[which]) + len(source.lengths))
        return _Piece(sample.tokens_T[begin:end], *sample.labels(begin, end), source.type_id)


def _padding(missing: int, longest: int) -> list[int]:
    """The lengths of the segments that ``missing`` tokens of padding make."""
    return [longest] * (missing // longest) + ([missing % longest] if missing % longest else [])


def _joined(arrays: list[np.ndarray], missing: int, filler: int, dtype: type) -> np.ndarray:
    return np.concatenate([*arrays, np.full(missing, filler)], dtype=dtype, casting="unsafe")
