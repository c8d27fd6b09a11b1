"""Boxes of arrays in files, against numpy's own indexing."""

import numpy as np
import pytest
import torch

from portmoe.checkpoint import arrays
from portmoe.checkpoint.arrays import Files, StoredArray
from portmoe.errors import TrainingError

# Small, so that every way of reading and writing is taken: whole rows, parts of them apart, and parts that
# are read with what lies between.
APART, BLOCK = 16, 96

BOXES = {
    (11,): [(0, 11), (3, 9), (5, 5)],
    (7, 9): [(0, 7, 0, 9), (2, 5, 0, 9), (1, 6, 3, 8), (0, 7, 4, 6), (6, 7, 8, 9)],
    (3, 5, 8): [(0, 3, 0, 5, 0, 8), (1, 3, 2, 4, 0, 8), (0, 2, 0, 5, 1, 7), (2, 3, 4, 5, 0, 3)],
}
CASES = [(shape, box) for shape, boxes in BOXES.items() for box in boxes]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(arrays, "APART_BYTES", APART)
    monkeypatch.setattr(arrays, "BLOCK_BYTES", BLOCK)


def slices(box):
    return tuple(map(slice, box[::2], box[1::2]))


def stored(path, shape, dtype, before=24):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    raw = values.view(torch.uint8).numpy().tobytes() if values.ndim else b""
    path.write_bytes(b"x" * before + raw + b"behind")
    return values, StoredArray(path, before, dtype, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "box"), CASES)
def test_a_box_is_read_as_numpy_cuts_it(tmp_path, shape, box, dtype):
    values, array = stored(tmp_path / "a", shape, dtype)
    wanted = values.float().numpy()[slices(box)]
    # Into a part of something larger, in another dtype, as a shard is.
    around = torch.full([size + 2 for size in wanted.shape], torch.nan)
    into = around[tuple(slice(1, 1 + size) for size in wanted.shape)]
    with Files() as files:
        array.read(files, slices(box), into)
    np.testing.assert_array_equal(into.numpy(), wanted)
    assert int(around.isnan().sum()) == around.numel() - wanted.size


@pytest.mark.parametrize(("shape", "box"), CASES)
def test_a_box_is_written_and_nothing_beside_it(tmp_path, shape, box):
    values, array = stored(tmp_path / "a", shape, torch.bfloat16)
    wanted = values.float().numpy().copy()
    wanted[slices(box)] = 7.5
    with Files(writing=True) as files:
        array.write(files, slices(box), torch.full(wanted[slices(box)].shape, 7.5))
    raw = (tmp_path / "a").read_bytes()
    assert raw[:24] == b"x" * 24
    assert raw.endswith(b"behind")
    found = torch.frombuffer(bytearray(raw[24:-6]), dtype=torch.bfloat16).view(shape)
    np.testing.assert_array_equal(found.float().numpy(), wanted)


def test_a_file_that_has_become_shorter_is_an_error_that_names_it(tmp_path):
    _, array = stored(tmp_path / "cut", (64, 64), torch.float32)
    with open(tmp_path / "cut", "r+b") as file:
        file.truncate(9000)
    with Files() as files, pytest.raises(TrainingError, match="cut has become shorter"):
        array.read(files, (slice(0, 64), slice(0, 64)), torch.empty(64, 64))


def test_only_the_bytes_of_a_box_are_read(tmp_path, monkeypatch):
    """Rows that are whole, and parts of rows that are longer than the bound."""
    monkeypatch.setattr(arrays, "APART_BYTES", 8192)
    _, array = stored(tmp_path / "a", (32, 8192), torch.float32)
    count = []
    preadv = arrays.os.preadv
    monkeypatch.setattr(arrays.os, "preadv", lambda *a: count.append(preadv(*a)) or count[-1])
    with Files() as files:
        array.read(files, (slice(8, 16), slice(0, 8192)), torch.empty(8, 8192))
        assert sum(count) == 8 * 8192 * 4
        count.clear()
        array.read(files, (slice(0, 32), slice(2048, 4096)), torch.empty(32, 2048))
        assert sum(count) == 32 * 2048 * 4
