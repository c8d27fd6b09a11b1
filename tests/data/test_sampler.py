"""The sampler against the benchmark's walk over epochs, written as a generator."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from portmoe.data.sampler import PackSampler


def walk(num_packs: int, micro_num: int, rank: int, size: int, seed: int) -> Iterator[list[int]]:
    rng = np.random.RandomState(seed)
    while True:
        ids = np.arange(num_packs)
        rng.shuffle(ids)
        ids = ids[: num_packs // (micro_num * size) * (micro_num * size)]
        own = ids[rank::size].tolist()
        while own:
            yield own[:micro_num]
            own = own[micro_num:]


@pytest.mark.parametrize(("num_packs", "micro_num", "size"), [(10, 2, 1), (23, 2, 2), (17, 1, 4), (8, 2, 4)])
def test_every_rank_over_several_epochs(num_packs, micro_num, size):
    for rank in range(size):
        expected = list(islice(walk(num_packs, micro_num, rank, size, seed=7), 40))
        sampler = PackSampler(num_packs, micro_num, rank, size, seed=7)
        assert [sampler.step(n) for n in range(40)] == expected


def test_the_first_epoch_is_written_down():
    """RandomState(1024).shuffle(arange(8)) is 0 2 7 5 4 6 1 3; two steps of 3 leave 1 and 3 out."""
    sampler = PackSampler(8, micro_num=3, rank=0, size=1, seed=1024)
    assert [sampler.step(0), sampler.step(1)] == [[0, 2, 7], [5, 4, 6]]
    assert sampler.steps_per_epoch == 2


def test_any_step_can_be_asked_first_and_in_any_order():
    expected = list(islice(walk(23, 2, 1, 2, seed=1024), 60))
    rng = np.random.default_rng(0)
    sampler = PackSampler(23, 2, 1, 2, seed=1024)
    for n in rng.permutation(60).tolist():
        assert sampler.step(n) == expected[n]
        assert PackSampler(23, 2, 1, 2, seed=1024).step(n) == expected[n]


@pytest.mark.parametrize("step", [0, 3, 11])
def test_a_step_holds_the_same_packs_however_they_are_divided(step):
    """{index: pack} over all ranks is the same for 1 · 4, 2 · 2 and 4 · 1."""
    divided = []
    for size in (1, 2, 4):
        numbered = {}
        for rank in range(size):
            sampler = PackSampler(19, 4 // size, rank, size, seed=3)
            numbered |= dict(zip(sampler.indices(step), sampler.step(step), strict=True))
        divided.append(numbered)
    assert sorted(divided[0]) == list(range(4 * step, 4 * step + 4))
    assert divided[0] == divided[1] == divided[2]


def test_too_few_packs_for_a_step_are_refused():
    with pytest.raises(ValueError, match="3 packs do not fill one step of 2 · 2"):
        PackSampler(3, micro_num=2, rank=0, size=2, seed=0)
