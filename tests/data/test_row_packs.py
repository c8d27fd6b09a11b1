"""Rows of samples against loops over single tokens: every token once, its label and its position."""

import time
from itertools import pairwise

import numpy as np
import pytest

from portmoe.data.batch import Batch
from portmoe.data.row_packs import PADDING_SEGMENT, RowPacks
from portmoe.data.rows import PACKINGS
from portmoe.data.sources.sample import Sample

LEARNED = 0.7
WIDE = 1000  # no sample of these tests is as long


class Numbered:
    """Samples whose tokens tell where they are from: token i of sample s is s · 1000 + i + 1."""

    def __init__(self, lengths: list[int], first: int = 0, type_id: int = 0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.type_id = type_id
        self.lengths = np.array(lengths, dtype=np.int64)
        self.learned = [rng.random(length) < LEARNED for length in lengths]
        self._first = first

    def sample(self, index: int) -> Sample:
        tokens_T = (self._first + index) * WIDE + np.arange(self.lengths[index]) + 1
        return Sample(tokens_T, self.learned[index])


def drawn(rng: np.random.Generator, seq_len: int) -> list[Numbered]:
    """Some data sets, with samples of one token, of exactly a row, and of more than one row."""
    sets, first = [], 0
    for type_id in range(rng.integers(1, 4)):
        lengths = rng.integers(1, 3 * seq_len, size=rng.integers(1, 12)).tolist()
        lengths += rng.choice([1, seq_len, 2 * seq_len], size=rng.integers(0, 4)).tolist()
        sets.append(Numbered(lengths, first, type_id, seed=int(rng.integers(1000))))
        first += len(lengths)
    return sets


def all_batches(packs: RowPacks) -> list[Batch]:
    return [Batch.from_pack(packs.pack(packs.in_order(number)), number) for number in range(len(packs))]


def expected_labels(sets: list[Numbered]) -> dict[int, int]:
    """Token → its label."""
    labels = {}
    for samples in sets:
        for index, length in enumerate(samples.lengths.tolist()):
            tokens = samples.sample(index).tokens_T.tolist()
            for i in range(length):
                learned = i + 1 < length and samples.learned[index][i + 1]
                labels[tokens[i]] = tokens[i + 1] if learned else -100
    return labels


@pytest.mark.parametrize("within_samples", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_token_of_every_sample_once_with_its_label_type_and_position(packing, within_samples):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        seq_len, width = int(rng.integers(1, 12)), int(rng.integers(1, 4))
        sets = drawn(rng, seq_len)
        packs = RowPacks(sets, packing, seq_len, width, within_samples, seed)
        types = {t: s.type_id for s in sets for i in range(len(s.lengths)) for t in s.sample(i).tokens_T}
        labels, found = expected_labels(sets), {}
        for batch in all_batches(packs):
            assert batch.tokens_T.shape == (width * seq_len,)
            real = batch.segments.real
            tokens = batch.tokens_T.tolist()
            for place, (token, label, kind) in enumerate(
                zip(tokens[:real], batch.labels_T.tolist(), batch.types_T.tolist(), strict=False)
            ):
                assert token not in found
                found[token] = label
                assert kind == types[token]
                continues = place and tokens[place - 1] == token - 1
                if within_samples and not continues:
                    assert place in batch.segments.offsets
            assert (batch.labels_T[real:] == -100).all()
            for begin, end in pairwise(batch.segments.offsets):
                assert batch.positions_T[begin:end].tolist() == list(range(end - begin))
                assert end - begin <= seq_len
                if within_samples and begin < real:  # one sample, in its order
                    assert tokens[begin:end] == list(range(tokens[begin], tokens[begin] + end - begin))
            assert batch.padding == width * seq_len - real
        assert found == labels
        assert sum(len(tokens) for tokens in [found]) == packs.num_tokens


def rows_of(packs: RowPacks) -> list[list[int]]:
    """The tokens of samples in each row."""
    return [
        Batch.from_pack(packs.pack((row,)), 0).tokens_T[: packs.rows.filled_R[row]].tolist()
        for row in range(packs.num_rows)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_cut_lays_the_shuffled_samples_end_to_end(seed):
    rng = np.random.default_rng(seed)
    seq_len = int(rng.integers(1, 12))
    sets = drawn(rng, seq_len)
    order = np.arange(sum(len(s.lengths) for s in sets))
    np.random.RandomState(seed).shuffle(order)
    samples = [s.sample(i).tokens_T.tolist() for s in sets for i in range(len(s.lengths))]
    stream = [token for number in order for token in samples[number]]
    packs = RowPacks(sets, "cut", seq_len, 1, True, seed)
    assert rows_of(packs) == [stream[i : i + seq_len] for i in range(0, len(stream), seq_len)]


def best_fit(lengths: list[int], seq_len: int) -> list[int]:
    """The room left in each row, by looking at every row for every sample, the longest first."""
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda number: room[number])] -= length
        else:
            room.append(seq_len - length)
    return room


@pytest.mark.parametrize("seed", range(60))
def test_whole_divides_no_sample_and_packs_as_best_fit_decreasing_does(seed):
    rng = np.random.default_rng(seed)
    seq_len = int(rng.integers(1, 40))
    lengths = rng.integers(1, seq_len + 1, size=rng.integers(1, 80)).tolist()
    packs = RowPacks([Numbered(lengths)], "whole", seq_len, 1, True, seed)
    assert packs.divided == 0
    rows = rows_of(packs)
    assert sorted(seq_len - len(row) for row in rows) == sorted(best_fit(lengths, seq_len))
    for row in rows:
        for number in {token // WIDE for token in row}:
            assert sum(token // WIDE == number for token in row) == lengths[number]


def test_whole_worked_out_by_hand():
    """Rows of 10; 7 6 5 4 3 3 2: 7+3, 6+4, 5+3+2. A sample of 23 is 10, 10 and 3."""
    packs = RowPacks([Numbered([3, 7, 5, 2, 6, 4, 3])], "whole", 10, 1, True, 0)
    assert sorted(packs.rows.filled_R.tolist()) == [10, 10, 10]
    long = RowPacks([Numbered([23, 7])], "whole", 10, 1, True, 0)
    assert sorted(long.rows.filled_R.tolist()) == [10, 10, 10]
    assert (long.divided, long.padding, long.num_tokens) == (1, 0, 30)


def test_none_gives_each_sample_a_row_and_the_rest_is_padding():
    packs = RowPacks([Numbered([3, 1, 5])], "none", 5, 2, True, 7)
    assert sorted(packs.rows.filled_R.tolist()) == [1, 3, 5]
    assert packs.padding == 6
    assert sum(batch.padding for batch in all_batches(packs)) == 6 + 5  # and a row that is not there


@pytest.mark.parametrize("packing", PACKINGS)
def test_one_sample_only(packing):
    for length in (1, 4, 5, 9):
        packs = RowPacks([Numbered([length])], packing, 4, 1, True, 0)
        assert [len(row) for row in rows_of(packs)] == [4] * (length // 4) + [length % 4] * (length % 4 > 0)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_seed_decides_the_order_and_nothing_else_does(packing):
    lengths = np.random.default_rng(0).integers(1, 20, 50).tolist()

    def rows(seed: int) -> list[list[int]]:
        return rows_of(RowPacks([Numbered(lengths)], packing, 16, 1, True, seed))

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)


def test_padding_is_attended_to_in_small_segments():
    """So that it costs next to nothing, and no segment of it holds a token of a sample."""
    seq_len = 3 * PADDING_SEGMENT
    packs = RowPacks([Numbered([10])], "none", seq_len, 1, True, 0)
    (batch,) = all_batches(packs)
    assert batch.segments.real_lengths == (10,)
    assert max(batch.segments.lengths) == PADDING_SEGMENT
    assert (batch.num_segments, batch.longest_segment, batch.padding) == (1, 10, seq_len - 10)


def test_an_empty_micro_batch_is_all_padding():
    packs = RowPacks([Numbered([10])], "cut", 8, 2, True, 0)
    batch = Batch.from_pack(packs.pack(()), 5)
    assert batch.segments.real == 0
    assert batch.padding == 16
    assert (batch.num_segments, batch.longest_segment) == (0, 0)
    assert (batch.labels_T == -100).all()


def test_only_the_samples_of_a_row_are_read():
    samples = Numbered([4] * 1000)
    asked = []
    read = samples.sample
    samples.sample = lambda index: (asked.append(index), read(index))[1]
    RowPacks([samples], "cut", 8, 1, True, 0).pack((250,))
    assert len(asked) == 2


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_million_samples_are_laid_out_in_seconds(packing):
    """Half a second to two here; the bound only tells an algorithm that is quadratic."""
    lengths = np.minimum(np.random.RandomState(0).lognormal(5.5, 1, 10**6).astype(np.int64) + 1, 40000)
    began = time.perf_counter()
    rows = PACKINGS[packing](lengths, 8192, np.random.RandomState(1).permutation(10**6))
    assert time.perf_counter() - began < 30
    assert rows.filled_R.sum() == lengths.sum()
    assert rows.filled_R.max() <= 8192


def test_rows_out_of_range_are_refused():
    packs = RowPacks([Numbered([4, 4])], "cut", 4, 1, True, 0)
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match=f"row {wrong} of 2"):
            packs.pack((wrong,))
        with pytest.raises(IndexError, match=f"pack {wrong} of 2"):
            packs.in_order(wrong)
