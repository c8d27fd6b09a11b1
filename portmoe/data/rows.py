"""Which piece of which sample lies in which row, from the samples' lengths alone.

A row has ``seq_len`` tokens, filled up with padding. Every token of every sample lies in one row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Rows:
    """Row r holds the pieces first_R[r] … first_R[r+1] − 1, one behind the other; int64.

    Piece p is the tokens begin_P[p] … end_P[p] − 1 of sample sample_P[p].
    """

    seq_len: int
    sample_P: np.ndarray
    begin_P: np.ndarray
    end_P: np.ndarray
    first_R: np.ndarray  # with one entry more than there are rows

    def __len__(self) -> int:
        return len(self.first_R) - 1

    @cached_property
    def filled_R(self) -> np.ndarray:
        """Tokens of samples in each row."""
        return _sums(self.end_P - self.begin_P, self.first_R)

    @cached_property
    def attended_R(self) -> np.ndarray:
        """Σ length² over the pieces of each row: what attention within them costs, up to a factor."""
        return _sums(np.square(self.end_P - self.begin_P), self.first_R)


def cut(lengths: np.ndarray, seq_len: int, order: np.ndarray) -> Rows:
    """Lay the samples end to end in ``order`` and cut every ``seq_len`` tokens, whatever lies there."""
    ends_S = np.cumsum(lengths[order])
    total = int(ends_S[-1]) if len(ends_S) else 0
    edges = np.union1d(ends_S, np.arange(0, total, seq_len))
    start_P, stop_P = edges[:-1], edges[1:]
    place_P = np.searchsorted(ends_S, start_P, side="right")
    sample_P = order[place_P]
    offset_P = ends_S[place_P] - lengths[sample_P]  # where the piece's sample begins
    rows = -(-total // seq_len)
    first_R = np.searchsorted(start_P, np.arange(rows + 1) * seq_len)
    return Rows(seq_len, sample_P, start_P - offset_P, stop_P - offset_P, first_R)


def whole(lengths: np.ndarray, seq_len: int, order: np.ndarray) -> Rows:
    """Put each sample whole into the fullest row that has room, the longest samples first.

    Best-fit decreasing; of equal lengths the first in ``order`` goes first. A sample longer than a row is
    divided into pieces of ``seq_len`` tokens and its rest (Ding et al. 2024, arXiv:2404.10830).
    """
    sample_P, begin_P, end_P = _pieces(lengths, seq_len, order)
    row_P = _best_fit(end_P - begin_P, seq_len)
    by_row = np.argsort(row_P, kind="stable")
    rows = int(row_P.max()) + 1 if len(row_P) else 0
    first_R = np.searchsorted(row_P[by_row], np.arange(rows + 1))
    return Rows(seq_len, sample_P[by_row], begin_P[by_row], end_P[by_row], first_R)


def none(lengths: np.ndarray, seq_len: int, order: np.ndarray) -> Rows:
    """Give each sample a row of its own; one longer than a row has several."""
    pieces = _pieces(lengths, seq_len, order)
    return Rows(seq_len, *pieces, np.arange(len(pieces[0]) + 1))


PACKINGS: dict[str, Callable[[np.ndarray, int, np.ndarray], Rows]] = {
    "cut": cut,
    "whole": whole,
    "none": none,
}


def _pieces(
    lengths: np.ndarray, seq_len: int, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample, begin and end of the pieces of at most ``seq_len`` tokens."""
    count_S = -(-lengths[order] // seq_len)
    sample_P = np.repeat(order, count_S)
    number_P = np.arange(len(sample_P)) - np.repeat(np.cumsum(count_S) - count_S, count_S)
    begin_P = number_P * seq_len
    return sample_P, begin_P, np.minimum(begin_P + seq_len, lengths[sample_P])


def _best_fit(length_P: np.ndarray, seq_len: int) -> np.ndarray:
    """Row of each piece, by best-fit decreasing.

    Pieces of one length are placed together: once one lies in a row, that row is the fullest with room for
    the next, as often as it fits.
    """
    row_P = np.empty(len(length_P), np.int64)
    waiting = np.argsort(-length_P, kind="stable")
    having: list[list[int]] = [[] for _ in range(seq_len + 1)]  # room left → rows
    count = np.zeros(seq_len + 1, np.int64)  # of them
    made = 0
    sorted_P = length_P[waiting]
    edges = np.flatnonzero(np.diff(sorted_P, prepend=0, append=0))
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        length = int(sorted_P[begin])
        for room in (np.flatnonzero(count[length:]) + length).tolist():
            begin = _fill(row_P, waiting[begin:end], length, room, having, count) + begin
            if begin == end:
                break
        if begin < end:
            fresh = -(-(end - begin) // (seq_len // length))
            having[seq_len] += range(made + fresh - 1, made - 1, -1)  # taken from the end
            count[seq_len] += fresh
            made += fresh
            _fill(row_P, waiting[begin:end], length, seq_len, having, count)
    return row_P


def _fill(
    row_P: np.ndarray,
    waiting: np.ndarray,
    length: int,
    room: int,
    having: list[list[int]],
    count: np.ndarray,
) -> int:
    """Put waiting pieces of one ``length`` into the rows that have ``room``; how many went there."""
    each = room // length
    used = having[room][-min(len(having[room]), -(-len(waiting) // each)) :][::-1]
    del having[room][-len(used) :]
    placed = min(len(used) * each, len(waiting))
    row_P[waiting[:placed]] = np.repeat(used, each)[:placed]
    count[room] -= len(used)
    last = placed - (len(used) - 1) * each  # what the last of these rows took
    for rows, taken in ((used[:-1], each), (used[-1:], last)):
        left = room - taken * length
        having[left] += rows
        count[left] += len(rows)
    return placed


def _sums(values_P: np.ndarray, first_R: np.ndarray) -> np.ndarray:
    """Return the sum over the pieces of each row."""
    upto = np.concatenate((np.zeros(1, np.int64), np.cumsum(values_P)))
    return upto[first_R[1:]] - upto[first_R[:-1]]
