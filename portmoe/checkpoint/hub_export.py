"""A checkpoint turned into a folder of the hub by one process: streamed, a few MiB in memory at a time."""

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from portmoe.checkpoint.arrays import BLOCK_BYTES, Files, StoredArray
from portmoe.checkpoint.hub_layout import Part, Piece, pieces
from portmoe.checkpoint.hub_write import Target
from portmoe.checkpoint.storage import Reader
from portmoe.checkpoint.store import read_record, require_sound
from portmoe.errors import ConfigError, TrainingError
from portmoe.families.hub import Made

PREFIX = "model."  # of the parameters' names in a checkpoint


def export(
    checkpoint: Path,
    target: Target,
    shapes: Mapping[str, tuple[int, ...]],
    made: Mapping[str, Made],
    progress: Callable[[str, int, int], None],
) -> None:
    """Write the weights of ``checkpoint`` into ``target``.

    Args:
        shapes: of the parameters, by name.
        progress: told what is done now, and how many of how many parameters are.

    Raises:
        ConfigError: it is no checkpoint, or one of another model.
        TrainingError: it is damaged, or the folder cannot be written; nothing is left of it then.
    """
    progress("checksums", 0, len(shapes))
    require_sound(checkpoint, read_record(checkpoint)["files"])
    metadata = Reader(checkpoint).read_metadata()
    _require_model(checkpoint, metadata, shapes)
    try:
        target.begin()
        with Files() as sources, target.filled() as files:
            for number, (name, shape) in enumerate(shapes.items()):
                progress(name, number, len(shapes))
                for chunk in metadata.state_dict_metadata[PREFIX + name].chunks:
                    stored = _stored(checkpoint, metadata, PREFIX + name, chunk)
                    for piece in pieces(made[name], shape, Part(tuple(chunk.offsets), tuple(chunk.sizes))):
                        _copy(stored, sources, piece, target.arrays[piece.tensor], files)
        target.finish()
    except TrainingError:
        target.abandon()
        raise


def _require_model(checkpoint: Path, metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> None:
    saved = metadata.state_dict_metadata
    for name, shape in shapes.items():
        kept = saved.get(PREFIX + name)
        if kept is None or tuple(kept.size) != tuple(shape):
            there = "absent" if kept is None else list(kept.size)
            raise ConfigError(
                f"checkpoint {checkpoint}: {name} is {there} and must be {list(shape)}; give the directory "
                "of a run as it is, config.yaml included"
            )


def _copy(source: StoredArray, sources: Files, piece: Piece, target: StoredArray, files: Files) -> None:
    """Copy one piece, some rows of the hub's tensor at a time."""
    box = [slice(place, place + 1) if isinstance(place, int) else place for place in piece.here]
    rows = len(box) - len(piece.there)  # the dimension of the source that is the target's first
    width = math.prod(part.stop - part.start for part in piece.there[1:])
    lines = max(1, BLOCK_BYTES // (width * source.dtype.itemsize))
    begin, end = piece.there[0].start, piece.there[0].stop
    for first in range(begin, end, lines):
        last = min(first + lines, end)
        box[rows] = slice(piece.here[rows].start + first - begin, piece.here[rows].start + last - begin)
        there = (slice(first, last), *piece.there[1:])
        block = torch.empty([part.stop - part.start for part in there], dtype=source.dtype)
        source.read(sources, tuple(box), block.view([part.stop - part.start for part in box]))
        target.write(files, there, block)


def _stored(checkpoint: Path, metadata: Metadata, name: str, chunk: ChunkStorageMetadata) -> StoredArray:
    """Where the numbers of a chunk lie: torch keeps each as an uncompressed archive within a file."""
    place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
    path = checkpoint / place.relative_path
    with open(path, "rb") as file, zipfile.ZipFile(_Within(file, place.offset, place.length)) as archive:
        (layout,) = (entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
        numbers = archive.getinfo(layout.removesuffix(".pkl") + "/0")
        dtype, start, shape, stride = _LayoutUnpickler(io.BytesIO(archive.read(layout))).load()
        contiguous = torch.empty(shape, device="meta").stride()
        size = math.prod(shape) * dtype.itemsize
        sound = (start, tuple(stride), numbers.file_size) == (0, contiguous, size)
        if not sound or numbers.compress_type != zipfile.ZIP_STORED or tuple(shape) != tuple(chunk.sizes):
            raise TrainingError(f"checkpoint {checkpoint}: {name} is kept in a form that is not understood")
        local_header = os.pread(file.fileno(), 30, place.offset + numbers.header_offset)
    before = (
        30 + int.from_bytes(local_header[26:28], "little") + int.from_bytes(local_header[28:30], "little")
    )
    return StoredArray(path, place.offset + numbers.header_offset + before, dtype, tuple(shape))


class _LayoutUnpickler(pickle.Unpickler):
    """Reads how a tensor lies in its storage, as ``torch.save`` notes it, and makes nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, start, shape, stride, *_: (storage, start, shape, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "FloatStorage"):
            return torch.float32
        raise pickle.UnpicklingError(f"{module}.{name} does not belong to a parameter")

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]


class _Within(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._place = file.fileno(), offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._length)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._length - self._place))
        found = os.pread(self._descriptor, count, self._offset + self._place)
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)
