"""The dummy data against the benchmark's checksum and against lists built as its text says."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from portmoe.data.dummy import DummyDataset

SHA_256 = "dfd9d1c94f1d4d14c76664e02a1992ed971ecc9d36836da0a3950441945b1515"


def by_lists(num_samples: int, seq_len: int, fixed_length: bool) -> list[list[int]]:
    rng = np.random.RandomState(1999)
    numbers = rng.randint(1, 30, size=num_samples)
    repeats = rng.randint(10, 200, size=num_samples)
    samples = []
    for n, r in zip(numbers.tolist(), repeats.tolist(), strict=True):
        while fixed_length and n * r < seq_len:
            r *= 2
        samples.append(([n, r] + list(range(n)) * r)[:seq_len])
    return samples


def test_first_samples_have_the_benchmarks_checksum():
    dataset = DummyDataset(500, 2048)
    joined = np.concatenate([dataset[i] for i in range(16)])
    assert joined.dtype == np.int64
    assert hashlib.sha256(joined.astype("<i8").tobytes()).hexdigest() == SHA_256


@pytest.mark.parametrize("fixed_length", [True, False])
@pytest.mark.parametrize("seq_len", [1, 2, 3, 40, 2048, 7000])
def test_samples_lengths_and_largest_token(seq_len, fixed_length):
    dataset = DummyDataset(60, seq_len, fixed_length)
    expected = by_lists(60, seq_len, fixed_length)
    assert len(dataset) == 60
    assert [sample.tolist() for sample in dataset] == expected
    assert dataset.lengths.dtype == np.int64
    assert dataset.lengths.tolist() == [len(sample) for sample in expected]
    assert dataset.max_token == max(max(sample) for sample in expected)


def test_free_lengths_differ_and_fixed_ones_do_not():
    assert set(DummyDataset(100, 2048).lengths.tolist()) == {2048}
    assert len(set(DummyDataset(100, 2048, fixed_length=False).lengths.tolist())) > 10


def test_token_0_is_not_learned():
    dataset = DummyDataset(20, 64)
    for index in range(20):
        sample = dataset.sample(index)
        assert sample.tokens_T.tolist() == dataset[index].tolist()
        assert sample.learned_T.tolist() == [token != 0 for token in dataset[index].tolist()]


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="num_samples=0"):
        DummyDataset(0, 8)


def test_the_public_name_needs_only_the_package():
    code = "import portmoe; print(len(portmoe.data.dummy.DummyDataset(3, 8)[0]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "8\n", done.stderr
