"""Where the numbers of a checkpoint lie, for one process that reads them alone, some at a time."""

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from portmoe.checkpoint.arrays import Files, StoredArray
from portmoe.checkpoint.hub_layout import Part
from portmoe.checkpoint.storage import Reader
from portmoe.checkpoint.store import read_record, require_sound
from portmoe.errors import ConfigError, TrainingError

PREFIX = "model."  # of the parameters' names in a checkpoint


class Chunks:
    """The parameters in the folder of a checkpoint.

    Args:
        shapes: of the parameters, by name.

    Raises:
        ConfigError: it is no checkpoint, or one of another model.
        TrainingError: it is damaged.
    """

    def __init__(self, checkpoint: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        require_sound(checkpoint, read_record(checkpoint)["files"])
        self._checkpoint = checkpoint
        self._metadata = Reader(checkpoint).read_metadata()
        _require_model(checkpoint, self._metadata, shapes)

    def of(self, name: str) -> Iterator[tuple[Part, StoredArray]]:
        """Yield the parts that together are a parameter, and where each lies."""
        for chunk in self._metadata.state_dict_metadata[PREFIX + name].chunks:
            stored = _stored(self._checkpoint, self._metadata, PREFIX + name, chunk)
            yield Part(tuple(chunk.offsets), tuple(chunk.sizes)), stored


@torch.no_grad()
def fill(checkpoint: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """Fill plain ``parameters``, by name, of any dtype and on any device, in place.

    Raises:
        ConfigError: it is no checkpoint, or one of another model.
        TrainingError: it is damaged. Parameters may be half filled.
    """
    chunks = Chunks(checkpoint, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    with Files() as files:
        for name, parameter in parameters.items():
            for part, stored in chunks.of(name):
                box = tuple(slice(o, o + size) for o, size in zip(part.offset, part.size, strict=True))
                everything = tuple(slice(0, size) for size in part.size)
                stored.read(files, everything, parameter.detach()[box])


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
