"""The benchmark's dummy data: samples made from two random integers each, nothing stored on disk."""

import numpy as np

from portmoe.data.sources.sample import Sample

SEED = 1999  # fixed by the benchmark, whatever run.seed is


class DummyDataset:
    """``num_samples`` samples ``[n, r, 0, 1, …, n−1, 0, 1, …]``, cut to ``seq_len`` tokens.

    One ``RandomState(1999)`` draws all n in 1…29, then all r in 10…199; the n numbers repeat r
    times. With ``fixed_length`` r is doubled until n·r ≥ ``seq_len``, so that every sample has
    exactly ``seq_len`` tokens. Source: the benchmark. Samples are made when asked for; only n and r
    are kept.

    ``dataset[i]`` is an int64 array; ``lengths`` holds the tokens per sample, int64.
    """

    type_id = 0  # the benchmark counts the dummy data as English

    def __init__(self, num_samples: int, seq_len: int, fixed_length: bool = True) -> None:
        if num_samples < 1 or seq_len < 1:
            raise ValueError(f"num_samples={num_samples} and seq_len={seq_len} must both be at least 1")
        rng = np.random.RandomState(SEED)
        self._n = rng.randint(1, 30, size=num_samples).astype(np.int64)
        self._r = rng.randint(10, 200, size=num_samples).astype(np.int64)
        if fixed_length:
            while (short := self._n * self._r < seq_len).any():
                self._r[short] *= 2
        self.lengths = np.minimum(2 + self._n * self._r, seq_len)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        n, r, length = self._n[index], self._r[index], self.lengths[index]
        tokens = np.empty(length, dtype=np.int64)
        tokens[:2] = (n, r)[:length]
        tokens[2:] = np.arange(length - 2) % n
        return tokens

    def sample(self, index: int) -> Sample:
        """Return one sample; token 0 is not learned."""
        return Sample.from_signed(self[index])

    @property
    def max_token(self) -> int:
        """The largest token of all samples."""
        largest = self._n if self.lengths[0] == 1 else np.maximum(self._n, self._r)
        return int(largest.max())
