"""Which packs or rows a data-parallel rank takes at which step."""

from functools import lru_cache

import numpy as np


class PackSampler:
    """The packs of one data-parallel rank, by step number alone, so that a run resumes anywhere.

    Each epoch's order is a new ``arange(num_packs)`` shuffled by one ``RandomState(seed)`` that goes
    on from epoch to epoch, cut to a multiple of ``micro_num`` · ``size`` packs; rank q takes every
    ``size``-th from q on, ``micro_num`` per step (the benchmark's sampler). So the packs of one step
    depend on the product ``micro_num`` · ``size`` alone, not on how it is divided.
    """

    def __init__(self, num_packs: int, micro_num: int, rank: int, size: int, seed: int) -> None:
        self._num_packs = num_packs
        self._micro_num = micro_num
        self._rank = rank
        self._size = size
        self._seed = seed
        self.steps_per_epoch = num_packs // (micro_num * size)
        if not self.steps_per_epoch:
            raise ValueError(f"{num_packs} packs do not fill one step of {micro_num} · {size}")
        self._begin()

    def _begin(self) -> None:
        self._rng = np.random.RandomState(self._seed)
        self._epoch = -1  # the last epoch drawn

    def _next_epoch(self) -> None:
        self._order = np.arange(self._num_packs)
        self._rng.shuffle(self._order)
        self._epoch += 1

    def steps(self, num_epochs: int) -> int:
        """Return how many steps are ``num_epochs`` epochs."""
        return num_epochs * self.steps_per_epoch

    def step(self, step: int) -> list[int]:
        """Return the ids of this rank's ``micro_num`` packs at ``step``, counted from 0."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        if epoch < self._epoch:
            self._begin()
        while self._epoch < epoch:
            self._next_epoch()
        first = inside * self._micro_num * self._size + self._rank
        return self._order[first :: self._size][: self._micro_num].tolist()

    def indices(self, step: int) -> list[int]:
        """Return the numbers of the same micro-batches, counted over all ranks since the run's start."""
        first = step * self._micro_num * self._size + self._rank
        return [first + j * self._size for j in range(self._micro_num)]


class RowSampler:
    """The rows of one data-parallel rank, by step number alone, so that a run resumes anywhere.

    Every epoch takes all rows once, in an order of its own. The epochs make one stream: step s takes the
    ``width`` · ``micro_num`` · ``size`` rows that follow those of step s − 1, wherever an epoch ends, so that
    every step has the same number. After ``num_epochs``, if given, nothing follows: the last step is filled
    up with empty micro-batches. So what a step takes depends on the product alone, not on how it is divided.

    Which rank takes which micro-batch is balanced: those of a step, by falling cost, are dealt out a round at
    a time, the most expensive one of a round to the rank that has least so far (Graham 1969, "Bounds on
    multiprocessing timing anomalies", with as many for each). Micro-batches of one round, which ranks that
    gather weights or exchange tokens wait for, then cost about the same.

    Args:
        cost_R: what attention costs in each row; everything else costs the same in all of them.
        width: rows per micro-batch.
    """

    def __init__(
        self,
        cost_R: np.ndarray,
        width: int,
        micro_num: int,
        rank: int,
        size: int,
        seed: int,
        num_epochs: int | None,
    ) -> None:
        self._cost_R = cost_R
        self._width = width
        self._micro_num = micro_num
        self._rank = rank
        self._size = size
        self._seed = seed
        self._end = None if num_epochs is None else num_epochs * len(cost_R)
        self.steps_per_epoch = len(cost_R) / (width * micro_num * size)
        self._order = lru_cache(maxsize=2)(self._drawn)  # a step has rows of two epochs at most, or few rows
        self._shares = lru_cache(maxsize=2)(self._dealt)

    def steps(self, num_epochs: int) -> int:
        """Return how many steps take every row ``num_epochs`` times."""
        return -(-num_epochs * len(self._cost_R) // (self._width * self._micro_num * self._size))

    def step(self, step: int) -> list[tuple[int, ...]]:
        """Return the rows of this rank's ``micro_num`` micro-batches at ``step``, counted from 0."""
        return [self._rows(index) for index in self.indices(step)]

    def indices(self, step: int) -> list[int]:
        """Return the numbers of the same micro-batches, counted over all ranks since the run's start."""
        return self._shares(step)[self._rank]

    def _rows(self, index: int) -> tuple[int, ...]:
        """The rows of micro-batch ``index`` of the stream; fewer than ``width``, or none, after its end."""
        first, rows = index * self._width, len(self._cost_R)
        last = first + self._width if self._end is None else min(first + self._width, self._end)
        return tuple(int(self._order(place // rows)[place % rows]) for place in range(first, last))

    def _drawn(self, epoch: int) -> np.ndarray:
        """The order of an epoch's rows."""
        order = np.arange(len(self._cost_R))
        np.random.RandomState([self._seed, epoch]).shuffle(order)
        return order

    def _dealt(self, step: int) -> list[list[int]]:
        """Rank → the numbers of its micro-batches at ``step``."""
        together = self._micro_num * self._size
        cost = {
            index: int(self._cost_R[list(self._rows(index))].sum())
            for index in range(step * together, (step + 1) * together)
        }
        falling = sorted(cost, key=lambda index: (-cost[index], index))
        shares: list[list[int]] = [[] for _ in range(self._size)]
        load = [0] * self._size
        for first in range(0, together, self._size):
            least_first = sorted(range(self._size), key=lambda rank: (load[rank], rank))
            for rank, index in zip(least_first, falling[first : first + self._size], strict=True):
                shares[rank].append(index)
                load[rank] += cost[index]
        return shares
