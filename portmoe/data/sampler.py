"""Which packs a data-parallel rank takes at which step."""

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
