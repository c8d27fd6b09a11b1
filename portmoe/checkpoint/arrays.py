"""Row-major arrays in files: boxes of them read into tensors and written from them, a few MiB at a time.

Files are read and not mapped: what this process holds of them is one block, a file that is cut short while
it is read is an error and no signal, and there are file systems that map none.
"""

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from portmoe.errors import TrainingError

BLOCK_BYTES = 4 << 20  # of a file, in memory at once
APART_BYTES = 256  # parts of rows that are smaller are read with what lies between them: fewer calls

Box = tuple[slice, ...]  # for every dimension a slice with start and stop


class Files:
    """Files opened once, to be read or to be written in place. A context manager."""

    def __init__(self, writing: bool = False) -> None:
        self._flags = os.O_RDWR if writing else os.O_RDONLY
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def descriptor(self, path: Path) -> int:
        """Return that of a file, opened when first asked for."""
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, self._flags)
        return self._descriptors[path]

    def descriptors(self) -> list[int]:
        """Those of all files opened so far."""
        return list(self._descriptors.values())


@dataclass(frozen=True)
class StoredArray:
    """An array in a file.

    Attributes:
        offset: of its first byte in the file.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, files: Files, box: Box, into: torch.Tensor) -> None:
        """Fill ``into``, which has the shape of ``box``, any dtype and any device.

        Raises:
            TrainingError: the file ends before the array does.
            OSError: it cannot be read.
        """
        descriptor, item = files.descriptor(self.path), self.dtype.itemsize
        for start, width, columns, block in self._blocks(box, into):
            own = block.shape[1] * item
            apart = width > block.shape[1] and own >= APART_BYTES
            staged = torch.empty(block.shape[0], block.shape[1] if apart else width, dtype=self.dtype)
            raw = _bytes(staged)
            if apart:
                for line in range(block.shape[0]):
                    place = start + (line * width + columns.start) * item
                    self._get(descriptor, raw[line * own : (line + 1) * own], place)
                block.copy_(staged)
            else:
                self._get(descriptor, raw, start)
                block.copy_(staged[:, columns])

    def write(self, files: Files, box: Box, values: torch.Tensor) -> None:
        """Write ``values``, which have the shape of ``box``, in the array's dtype and nothing beside them.

        Raises:
            OSError: the file cannot be written.
        """
        descriptor, item = files.descriptor(self.path), self.dtype.itemsize
        for start, width, columns, block in self._blocks(box, values):
            raw, own = _bytes(block.to("cpu", self.dtype).contiguous()), block.shape[1] * item
            if width == block.shape[1]:
                _put(descriptor, raw, start)
                continue
            for line in range(block.shape[0]):
                place = start + (line * width + columns.start) * item
                _put(descriptor, raw[line * own : (line + 1) * own], place)

    def _blocks(self, box: Box, values: torch.Tensor) -> Iterator[tuple[int, int, slice, torch.Tensor]]:
        """Some rows of a matrix: (byte where the first begins, width, columns of the box, their values)."""
        shape = self.shape
        if not values.numel():
            return
        if len(shape) == 1:  # a column
            shape, box, values = (*shape, 1), (*box, slice(0, 1)), values[:, None]
        height, width = shape[-2:]
        lines = max(1, BLOCK_BYTES // max(1, width * self.dtype.itemsize))
        rows, columns = box[-2:]
        outer = [range(part.start, part.stop) for part in box[:-2]]
        matrices = values.view(-1, *values.shape[-2:])
        for place, matrix in zip(itertools.product(*outer), matrices, strict=True):
            number = 0
            for index, size in zip(place, shape, strict=False):
                number = number * size + index
            for first in range(rows.start, rows.stop, lines):
                start = self.offset + (number * height + first) * width * self.dtype.itemsize
                yield start, width, columns, matrix[first - rows.start :][:lines]

    def _get(self, descriptor: int, left: memoryview, start: int) -> None:
        while left:
            count = os.preadv(descriptor, [left], start)
            if not count:
                raise TrainingError(f"{self.path} has become shorter while it was read; restore the file")
            left, start = left[count:], start + count


def _bytes(values: torch.Tensor) -> memoryview:
    """The memory of contiguous ``values``, to read into and to write from."""
    return memoryview(values.view(-1).view(torch.uint8).numpy())


def _put(descriptor: int, left: memoryview, start: int) -> None:
    while left:
        count = os.pwritev(descriptor, [left], start)
        left, start = left[count:], start + count
