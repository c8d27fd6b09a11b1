"""Which rows a step takes: a stream of epochs, the same on any number of ranks, dealt out by cost."""

import numpy as np
import pytest

from portmoe.data.rows import PACKINGS
from portmoe.data.sampler import RowSampler


def sampler(costs, micro_num=1, rank=0, size=1, width=1, seed=5, num_epochs=None) -> RowSampler:
    return RowSampler(np.asarray(costs), width, micro_num, rank, size, seed, num_epochs)


def taken(costs, step, size, together, **more) -> dict[int, tuple[int, ...]]:
    """Number → rows of the micro-batches of a step, over all ranks."""
    numbered = {}
    for rank in range(size):
        one = sampler(costs, together // size, rank, size, **more)
        mine = dict(zip(one.indices(step), one.step(step), strict=True))
        assert len(mine) == together // size
        assert not mine.keys() & numbered.keys()
        numbered |= mine
    return numbered


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(("rows", "together"), [(10, 4), (23, 6), (4, 12), (1, 3)])
def test_the_epochs_are_a_stream_of_all_rows(rows, together, width):
    """Each epoch has every row once, and no two of the first three have the same order."""
    costs = np.random.default_rng(rows).integers(1, 100, rows)
    steps = -(-5 * rows // (together * width))
    stream = []
    for step in range(steps):
        numbered = taken(costs, step, 1, together, width=width)
        assert sorted(numbered) == list(range(step * together, (step + 1) * together))
        stream += [row for index in sorted(numbered) for row in numbered[index]]
    epochs = [stream[epoch * rows : (epoch + 1) * rows] for epoch in range(5)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    if rows > 4:
        assert len({tuple(epoch) for epoch in epochs}) == 5


def test_any_step_can_be_asked_first_and_in_any_order():
    costs = np.random.default_rng(0).integers(1, 100, 23)
    one = sampler(costs, micro_num=3, rank=1, size=2)
    expected = [(one.step(n), one.indices(n)) for n in range(40)]
    for n in np.random.default_rng(1).permutation(40).tolist():
        assert (one.step(n), one.indices(n)) == expected[n]
        fresh = sampler(costs, micro_num=3, rank=1, size=2)
        assert (fresh.step(n), fresh.indices(n)) == expected[n]


@pytest.mark.parametrize("num_epochs", [None, 2])
def test_a_step_takes_the_same_rows_on_any_number_of_ranks(num_epochs):
    costs = np.random.default_rng(2).integers(1, 1000, 31)
    for step in range(6):
        divided = [taken(costs, step, size, 12, num_epochs=num_epochs) for size in (1, 2, 3, 4, 6, 12)]
        assert all(numbered == divided[0] for numbered in divided)


def test_the_rows_of_a_step_do_not_depend_on_how_many_a_micro_batch_has():
    costs = np.random.default_rng(3).integers(1, 1000, 31)
    for step in range(6):
        found = [
            sorted(row for rows in taken(costs, step, 1, 12 // width, width=width).values() for row in rows)
            for width in (1, 2, 4)
        ]
        assert found[0] == found[1] == found[2]


def test_the_last_epoch_is_filled_up_by_empty_micro_batches():
    """7 rows three times are 21: five steps of 4, and one row in the sixth."""
    one = sampler([1] * 7, micro_num=4, num_epochs=3)
    assert one.steps(3) == 6
    assert one.steps_per_epoch == 7 / 4
    rows = [row for step in range(6) for row in one.step(step)]
    assert rows.count(()) == 3
    counts = np.bincount([row[0] for row in rows if row])
    assert counts.tolist() == [3] * 7
    two = sampler([1] * 7, micro_num=2, width=2, num_epochs=3)
    assert sorted(map(len, two.step(5))) == [0, 1]  # the last one but for a single row


def test_the_ranks_get_micro_batches_of_about_the_same_cost():
    """8 6 5 5 | 4 3 2 1 are dealt out so: 8 + 1, 6 + 2, 5 + 3, 5 + 4; unsorted the worst could be 8 + 6."""
    costs = [3, 8, 5, 1, 6, 2, 5, 4]
    shares = [sampler(costs, 2, rank, 4).step(0) for rank in range(4)]
    loads = sorted(sum(costs[row] for (row,) in share) for share in shares)
    assert loads == [8, 8, 9, 9]
    for share in shares:  # the more expensive one first: all ranks' first ones take about as long
        assert costs[share[0][0]] >= 5 > costs[share[1][0]]


def test_balance_of_real_rows():
    """The slowest rank takes on average 7 % over what no deal could undercut, and 28 % when dealt in turn."""
    lengths = np.minimum(np.random.RandomState(0).lognormal(6, 1.2, 20000).astype(np.int64) + 1, 8192)
    costs = PACKINGS["cut"](lengths, 8192, np.random.RandomState(1).permutation(20000)).attended_R
    ours, in_turn = [], []
    for step in range(10):
        shares = [sampler(costs, 8, rank, 8).step(step) for rank in range(8)]
        rows = np.array([[row for (row,) in share] for share in shares])
        loads = costs[rows].sum(1)
        least = max(loads.mean(), costs[rows].max())
        ours.append(loads.max() / least)
        shuffled = np.random.RandomState(step).permutation(rows.flatten())
        in_turn.append(costs[shuffled.reshape(8, 8)].sum(1).max() / least)
    assert np.mean(ours) < 1.08
    assert np.mean(in_turn) > 1.2
