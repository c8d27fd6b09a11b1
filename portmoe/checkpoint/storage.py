"""DCP's files, written so that a checkpoint is whole or not there, and read without running foreign code."""

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from portmoe.checkpoint.folder import (
    METADATA_FILE,
    STATE_FILE,
    crc32,
    folder_of,
    partial_of,
    sync_folder,
)
from portmoe.checkpoint.upkeep import clear, vacant
from portmoe.errors import TrainingError
from portmoe.files import json_text, write_whole

FORMAT = 1  # of STATE_FILE

# What DCP's own metadata is made of: the only classes that reading one may create.
_METADATA_CLASSES = {
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


@dataclass(frozen=True)
class _Written(WriteResult):
    """What DCP reports of one tensor written, and the checksum of the file it lies in."""

    crc32: int


class Writer(dcp.FileSystemWriter):
    """DCP's writer into the partial folder; ``finish`` makes the checkpoint whole.

    DCP calls ``prepare_global_plan`` on rank 0 before any rank writes, and ``finish`` on rank 0
    after every rank has written and synced; what either raises reaches all ranks.
    """

    def __init__(
        self, folder: Path, step: int, state: dict[str, Any], whole: Callable[[Path | None], None]
    ) -> None:
        """``whole`` is called on rank 0 when the checkpoint is, with the folder of any it replaced."""
        super().__init__(partial_of(folder, step))
        self._folder, self._step, self._state, self._whole = folder, step, state, whole

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        partial = Path(self.path)
        clear(partial)  # a killed run may have left files of another layout
        partial.mkdir()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).value()
        names = {result.storage_data.relative_path for result in results}
        sums = {name: crc32(Path(self.path, name)) for name in names}
        sync_folder(Path(self.path))
        written: Future[list[WriteResult]] = Future()
        written.set_result([_Written(**vars(r), crc32=sums[r.storage_data.relative_path]) for r in results])
        return written

    def finish(self, metadata: Metadata, results: list[list[_Written]]) -> None:
        super().finish(metadata, results)
        partial, final = Path(self.path), folder_of(self._folder, self._step)
        files = {r.storage_data.relative_path: r.crc32 for of_rank in results for r in of_rank}
        files[METADATA_FILE] = crc32(partial / METADATA_FILE)
        record = {"format": FORMAT, "step": self._step, "files": files, "state": self._state}
        write_whole(partial / STATE_FILE, json_text(record, indent=1))
        sync_folder(partial)
        replaced = None
        if os.path.lexists(final):
            replaced = vacant(final.with_suffix(".replaced"))
            os.replace(final, replaced)
        os.replace(partial, final)
        sync_folder(self._folder)
        self._whole(replaced)


class Reader(dcp.FileSystemReader):
    """DCP's reader, taking nothing from the metadata file but DCP's own classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with open(Path(self.path, METADATA_FILE), "rb") as file:
                return _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise TrainingError(f"checkpoint {self.path} is damaged: {METADATA_FILE}: {error}") from error


class _MetadataUnpickler(pickle.Unpickler):
    """DCP writes its index as a pickle; a foreign one must not be able to run code."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in _METADATA_CLASSES.get(module, ())
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's metadata")
