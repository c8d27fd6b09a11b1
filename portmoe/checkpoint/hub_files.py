"""The hub's files: safetensors and the index over several of them, understood and checked byte by byte.

The library of the format writes a file from whole tensors in memory, and reads by mapping; here files are
written in place by all ranks, each its part, and read into shards (see ``arrays``). So this project has the
one page of the format itself, and its tests hold it to the library both ways.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from portmoe.checkpoint.arrays import StoredArray
from portmoe.config.pretrained import AGAIN, once, read_json
from portmoe.errors import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE_BYTES = 5 * 10**9  # a file holds as many whole tensors as fit
MOST_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What old files hold beside the weights and every program computes anew.
AUXILIARY = re.compile(r"(.+\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)")


@dataclass(frozen=True)
class HubFolder:
    """The tensors of a folder by name, auxiliary ones apart."""

    path: Path
    tensors: Mapping[str, StoredArray]
    auxiliary: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Those of all tensors."""
        return sum(array.bytes for array in self.tensors.values())


def read_folder(folder: Path) -> HubFolder:
    """Find every tensor of a folder; reads headers only.

    Raises:
        ConfigError: the folder's files are no whole model in safetensors, naming file and tensor.
    """
    try:
        return _read_folder(folder)
    except OSError as error:
        where = error.filename or folder
        raise ConfigError(f"{where} cannot be read: {error.strerror}; repair the folder") from None


def _read_folder(folder: Path) -> HubFolder:
    index = None if (folder / SINGLE).is_file() else _read_index(folder)
    files = (SINGLE,) if index is None else tuple(sorted(set(index.values())))
    tensors: dict[str, StoredArray] = {}
    unread: dict[str, str] = {}
    for file in files:
        for name, (dtype, offset, shape) in _read_header(folder / file).items():
            if index is not None and index.get(name) != file:
                said = f"says {index[name]}" if name in index else "does not name it"
                raise ConfigError(f"{folder / file} holds {name!r}, and {INDEX} {said}; {AGAIN}")
            if dtype in DTYPES:
                tensors[name] = StoredArray(folder / file, offset, DTYPES[dtype], shape)
            else:
                unread[name] = dtype
    absent = [name for name in index or () if name not in tensors and name not in unread]
    if absent:
        raise ConfigError(f"{folder / index[absent[0]]} lacks {_listed(absent)}, which {INDEX} says; {AGAIN}")
    auxiliary = tuple(name for name in (*tensors, *unread) if AUXILIARY.fullmatch(name))
    if strange := [f"{name!r} ({unread[name]})" for name in unread if name not in auxiliary]:
        raise ConfigError(
            f"{folder}: {', '.join(strange[:4])}{_more(strange, 4)} must be one of {', '.join(DTYPES)}; "
            "convert the folder to bfloat16, float16 or float32"
        )
    kept = {name: array for name, array in tensors.items() if name not in auxiliary}
    return HubFolder(folder, kept, auxiliary, files)


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor → file."""
    path = folder / INDEX
    if not path.is_file():
        there = sorted(entry.name for entry in folder.iterdir())
        if any(name.endswith((".bin", ".pt", ".pth")) for name in there):
            raise ConfigError(
                f"{folder} holds weights as pickles only, which are never read; convert them to safetensors"
            )
        found = [name for name in there if name.endswith(".safetensors")]
        but = f", only {_listed(found)}" if found else ""
        raise ConfigError(f"{folder} holds neither {SINGLE} nor {INDEX}{but}; {AGAIN}")
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{path}: weight_map must be an object, tensor → file; {AGAIN}")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise ConfigError(
                f"{path}: {tensor!r} → {file!r} must be a .safetensors file of the folder; {AGAIN}"
            )
    missing = sorted(file for file in set(weight_map.values()) if not (folder / file).is_file())
    if missing:
        raise ConfigError(f"{folder} lacks {_listed(missing)}, which {INDEX} names; {AGAIN}")
    return weight_map


def _read_header(path: Path) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Tensor → (dtype, byte of the file where it begins, shape)."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > MOST_HEADER_BYTES:
            raise ConfigError(f"{path} is cut short or no safetensors file: {size:,} bytes; {AGAIN}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=once)
        header.pop("__metadata__", None)
        found = {name: _entry(name, entry) for name, entry in header.items()}
    except (ValueError, RecursionError, AttributeError) as error:
        raise ConfigError(f"{path}: its header is broken: {error}; {AGAIN}") from None
    reached = 0
    for name, (_, begin, end, _) in sorted(found.items(), key=lambda item: item[1][1:3]):
        if begin != reached:
            raise ConfigError(f"{path}: {name!r} begins at byte {begin:,} and not at {reached:,}; {AGAIN}")
        reached = end
    if reached != size - 8 - length:
        cut = "is cut short" if reached > size - 8 - length else "is too long"
        raise ConfigError(
            f"{path} {cut}: its tensors take {reached:,} bytes and it has {size - 8 - length:,}; {AGAIN}"
        )
    return {name: (dtype, 8 + length + begin, shape) for name, (dtype, begin, _, shape) in found.items()}


def _entry(name: str, entry: Any) -> tuple[str, int, int, tuple[int, ...]]:
    """(dtype, begin, end, shape) of a tensor in a header."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name!r} has no dtype, shape or data_offsets that can be")
    known = DTYPES.get(dtype)
    if end < begin or (known is not None and end - begin != math.prod(shape) * known.itemsize):
        raise ValueError(f"{name!r} of {dtype} {list(shape)} cannot take bytes {begin:,} to {end:,}")
    return dtype, begin, end, shape


def require(folder: HubFolder, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a folder whose tensors are not these.

    Raises:
        ConfigError: naming those that are missing, too many or of another shape.
    """
    problems = [f"{name!r} is missing" for name in shapes if name not in folder.tensors]
    problems += [f"{name!r} does not belong to this model" for name in folder.tensors if name not in shapes]
    for name, shape in shapes.items():
        array = folder.tensors.get(name)
        if array is not None and array.shape != shape:
            problems.append(f"{name!r} is {list(array.shape)} and must be {list(shape)}")
    if problems:
        raise ConfigError(
            f"{folder.path} is not the model of its config.json: {'; '.join(problems[:8])}"
            f"{_more(problems, 8)}; give the folder of one whole model"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + _more(names, 4)


def _more(items: Sequence[str], shown: int) -> str:
    return f" and {len(items) - shown:,} more" if len(items) > shown else ""


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written: its name, its header, and where its tensors lie."""

    name: str
    header: bytes
    arrays: Mapping[str, StoredArray]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(array.bytes for array in self.arrays.values())


def plan(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
) -> list[PlannedFile]:
    """Distribute tensors over files in their order, each of at most ``FILE_BYTES`` of whole tensors."""
    shares: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtypes[name].itemsize
        if shares[-1] and filled + size > FILE_BYTES:
            shares.append([])
            filled = 0
        shares[-1].append(name)
        filled += size
    number = len(shares)
    return [
        _planned(
            folder,
            SINGLE if number == 1 else f"model-{i:05d}-of-{number:05d}.safetensors",
            {name: (dtypes[name], shapes[name]) for name in names},
        )
        for i, names in enumerate(shares, start=1)
    ]


def _planned(
    folder: Path, file: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> PlannedFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin, begins = 0, {}
    # The wider types first, so that every tensor begins at a multiple of its item size.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begins[name], begin = begin, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = len(text).to_bytes(8, "little") + text
    arrays = {name: StoredArray(folder / file, len(whole) + begins[name], *tensors[name]) for name in tensors}
    return PlannedFile(file, whole, arrays)


def index_of(files: Sequence[PlannedFile]) -> dict[str, Any] | None:
    """The content of the index over ``files``; None for a single one, which needs none."""
    if len(files) == 1:
        return None
    arrays = {name: array for file in files for name, array in file.arrays.items()}
    return {
        "metadata": {
            "total_parameters": sum(math.prod(array.shape) for array in arrays.values()),
            "total_size": sum(array.bytes for array in arrays.values()),
        },
        "weight_map": {name: array.path.name for name, array in sorted(arrays.items())},
    }
