"""Data sets tokenized beforehand, in the folder format of InternEvo.

``<folder>/**/<name>.bin`` holds one JSON object per line, ``{"tokens": [12, 7, …]}``;
``<name>.bin.meta`` is a two-column integer array written by ``numpy.save``, one row
(byte offset of the line, number of tokens) per line. A negative token is read as its absolute value and
marks, as token 0 does, what is not to be learned.
"""

import errno
import json
import mmap
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from portmoe.data.sources.sample import DATA_TYPES, Sample
from portmoe.errors import ConfigError

# What a file system says that maps no files into memory; a file is then read as a whole.
NO_MAPPING = {errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP}


class TokenizedFile:
    """The samples of one ``.bin`` file with at least ``min_length`` tokens; read when asked for.

    Raises ``ConfigError`` naming the file, and the line where it is one, if something is missing or
    broken. ``key`` is the config key the folder came from.
    """

    def __init__(self, path: Path, key: str, min_length: int = 0, type_id: int = 0) -> None:
        self._path = path
        self._key = key
        self.type_id = type_id
        meta = self._read_meta()
        meta = meta[meta[:, 1] >= max(min_length, 1)]
        self._offsets, self.lengths = meta[:, 0], meta[:, 1]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        offset, length = int(self._offsets[index]), int(self.lengths[index])
        end = self._lines.find(b"\n", offset)
        line = self._lines[offset : end if end >= 0 else len(self._lines)]
        try:
            tokens = np.array(json.loads(line.decode("utf-8"))["tokens"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._broken_line(offset, f'is not {{"tokens": [integers]}} ({error!r:.200})') from error
        if tokens.ndim != 1 or tokens.dtype != np.int64:
            raise self._broken_line(offset, 'is not {"tokens": [integers]}')
        if len(tokens) != length:
            raise self._broken_line(offset, f"has {len(tokens)} tokens, and its .meta says {length}")
        return tokens

    def sample(self, index: int) -> Sample:
        """Return one sample; a token ≤ 0 is not learned."""
        return Sample.from_signed(self[index])

    @cached_property
    def _lines(self) -> mmap.mmap | bytes:
        try:
            with self._path.open("rb") as file:
                try:
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    if error.errno not in NO_MAPPING:
                        raise
                    return file.read()
        except (OSError, ValueError) as error:  # ValueError: emptied since the .meta was read
            raise self._unusable(f"{self._path} cannot be read ({error})") from error

    def _read_meta(self) -> np.ndarray:
        """Return the .meta file's rows, int64, checked against the size of the .bin file."""
        path = self._path.with_name(self._path.name + ".meta")
        try:
            with path.open("rb") as file:
                meta = np.lib.format.read_array(file, allow_pickle=False)
            size = self._path.stat().st_size
        except FileNotFoundError as error:
            raise self._unusable(f"{error.filename} does not exist; every .bin file needs one") from error
        except (OSError, ValueError) as error:
            raise self._unusable(f"{path} is not a numpy array file ({error})") from error
        if meta.size == 0:
            return np.empty((0, 2), dtype=np.int64)
        if meta.dtype.kind not in "iu" or meta.ndim != 2 or meta.shape[1] != 2:
            raise self._unusable(f"{path} must hold two integer columns, (byte offset, number of tokens)")
        meta = meta.astype(np.int64)
        if meta.min() < 0 or meta.max() >= size:  # a token takes at least one byte
            raise self._unusable(
                f"{path} names bytes or tokens that {self._path} ({size} bytes) does not have"
            )
        return meta

    def _broken_line(self, offset: int, what: str) -> ConfigError:
        number = self._lines[:offset].count(b"\n") + 1
        return self._unusable(f"line {number} of {self._path} (byte {offset}) {what}")

    def _unusable(self, what: str) -> ConfigError:
        return ConfigError(f"{self._key}: {what}; tokenize the file again together with its .meta")


def open_folder(folder: str, key: str, min_length: int) -> list[TokenizedFile]:
    """Open every ``.bin`` file below ``folder``, folder by folder in the order of their names.

    The part of a path that says en, cn or code (a folder's whole name, or a piece of the file's name
    between ``-``, ``_`` and ``.``; the outermost counts) gives the type; without one it is en.
    """
    root = Path(folder)
    if not os.path.isdir(root):  # unlike Path.is_dir, False for a name that no file can have
        problem = "is not a folder" if os.path.exists(root) else "does not exist"
        raise ConfigError(
            f"{key}={folder!r} {problem}; name a file or folder of conversations or text, or a folder of "
            "tokenized .bin files, or set it to null"
        )
    files = []
    for parent, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        paths = [Path(parent, name) for name in sorted(names) if name.endswith(".bin")]
        files += [TokenizedFile(path, key, min_length, _type_id(path.relative_to(root))) for path in paths]
    if not files:
        raise ConfigError(
            f"{key}={folder!r} holds no .bin file, nor one of text or conversations; name a folder of such "
            "files or set it to null"
        )
    return files


def _type_id(path: Path) -> int:
    pieces = [*path.parts[:-1], *path.name.replace("-", ".").replace("_", ".").split(".")]
    return next((DATA_TYPES.index(piece) for piece in pieces if piece in DATA_TYPES), 0)
