"""Checkpoints: torch's distributed checkpoint (DCP) for the tensors, one JSON file for the rest.

A checkpoint is the folder ``step-00000050``; the number counts completed steps. It is written as
``step-00000050.partial`` and renamed once every rank's data and the JSON are on disk, so that a
folder with the plain name is whole, whatever killed the run and whenever. ``state.json`` holds the
trainer's state and a CRC-32 of every file, because torch's reader does not notice a flipped bit.

DCP stores tensors by name and global shape, so a checkpoint saved under one layout loads under any
other, and it writes a replicated tensor once.
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from portmoe.checkpoint.agreement import agree, on_first_rank
from portmoe.checkpoint.folder import (
    STATE_FILE,
    beyond,
    complete_steps,
    crc32,
    folder_of,
    partial_of,
)
from portmoe.checkpoint.storage import FORMAT, Reader, Writer
from portmoe.checkpoint.upkeep import clear, remove, tidy, vacant
from portmoe.errors import ConfigError, TrainingError


class Checkpointer:
    """Saves into and loads from one folder of checkpoints. Every method is called by all ranks together.

    Args:
        folder: holds the ``step-*`` folders; must be shared by all ranks.
        keep: how many of the newest checkpoints stay. The newest may hold weights that are broken, which only
            the next step can show: the one before it stays until ``confirm``.
        asynchronous: copy the tensors, then write in the background while training goes on. The
            copy stays allocated for the next save: host memory of this rank's share of the tensors.
        group: a gloo group of all ranks that nothing else uses: the background write communicates.
        always: steps whose checkpoints stay whatever ``keep`` is.

    Attributes:
        best: the step of another one that stays.
        on_whole: called on rank 0 with the step of each checkpoint that was written, and with the file that
            holds the checksums of its others; from any thread.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        asynchronous: bool,
        group: dist.ProcessGroup,
        always: Collection[int] = (),
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.best: int | None = None
        self._always = frozenset(always)
        self.on_whole: Callable[[int, Path], None] = lambda step, state_file: None
        self.asynchronous = asynchronous
        self._group = group
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._in_flight: tuple[int, Future[Any]] | None = None
        self._unconfirmed: int | None = None  # the step saved last
        self._problems: list[str] = []

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], best: bool = False
    ) -> None:
        """Save ``tensors`` (by name, plain or DTensor) and ``state`` (JSON; rank 0's is kept).

        Asynchronously, it returns once the tensors are copied. A save still in flight is waited for first.
        Once the ``best`` is whole, the former one is as old as it is.

        Raises:
            TrainingError: this save, or the one in flight, failed. Older checkpoints are untouched.
        """
        self.wait()
        if best:
            self.best = step
        strangers = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        if strangers:
            raise TypeError(f"a checkpoint holds tensors only; put these into the state: {strangers}")
        detached = {name: value.detach() for name, value in tensors.items()}
        # A copy: the caller's objects change while a background write waits for its turn.
        writer = Writer(self.folder, step, json.loads(json.dumps(state)), partial(self._became_whole, step))
        self._unconfirmed = step
        try:
            if self.asynchronous:
                future = dcp.async_save(
                    detached, storage_writer=writer, process_group=self._group, async_stager=self._stager
                )
                self._in_flight = (step, future)
            else:
                dcp.save(detached, storage_writer=writer, process_group=self._group)
        except (Exception, dcp.CheckpointException) as error:
            raise self._save_failed(step, error) from error

    def wait(self) -> None:
        """Return when nothing is in flight; raise TrainingError if what was in flight failed."""
        if self._in_flight is None:
            return
        step, future = self._in_flight
        self._in_flight = None
        try:
            future.result()
        except (Exception, dcp.CheckpointException) as error:
            raise self._save_failed(step, error) from error

    def confirm(self) -> None:
        """Note that training has gone on well from the state saved last, so that older ones may go."""
        step = self._unconfirmed
        if step is None or (self._in_flight is not None and not self._in_flight[1].done()):
            return
        self._unconfirmed = None
        if self.keep == 1 and dist.get_rank(self._group) == 0:
            remove(beyond(self.folder, step, self.keep, self._stay()), self._problems.append)

    def problems(self) -> list[str]:
        """What went wrong since the last call without harm to any checkpoint: known on rank 0."""
        told, self._problems[:] = list(self._problems), []
        return told

    def close(self) -> None:
        """Wait for the save in flight and free the copy."""
        try:
            self.wait()
        finally:
            self._stager.close()

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None. Removes what killed runs left over."""
        self.wait()
        return on_first_rank(self._group, self._tidied_latest)

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill ``tensors`` in place from the checkpoint of ``step``; return its state. See ``read``."""
        self.wait()
        return read(folder_of(self.folder, step), tensors, self._group)

    def resume(
        self, tensors: Mapping[str, Tensor], log: Callable[[str], None]
    ) -> tuple[int, dict[str, Any]] | None:
        """Load the newest checkpoint that can be read; return (step, state), or None if there is none.

        A damaged one is set aside as ``step-*.damaged``, said through ``log``, and the next older is
        tried: losing some steps is better than losing the run.

        Raises:
            ConfigError: the checkpoint is of another model.
            TrainingError: every checkpoint there is damaged.
        """
        step = self.latest()
        failure: TrainingError | None = None
        while step is not None:
            try:
                return step, self.load(step, tensors)
            except TrainingError as error:
                failure = error
            older = on_first_rank(self._group, lambda step=step: self._set_aside(step))
            log(f"WARNING: {failure}; going back to {'nothing' if older is None else f'step {older}'}")
            step = older
        if failure is not None:
            raise TrainingError(f"no checkpoint in {self.folder} can be read; the last failure: {failure}")
        return None

    def _became_whole(self, step: int, replaced: Path | None) -> None:
        self.on_whole(step, folder_of(self.folder, step) / STATE_FILE)
        older = beyond(self.folder, step, max(self.keep, 2), self._stay())
        remove([replaced, *older] if replaced else older, self._problems.append)

    def _stay(self) -> frozenset[int | None]:
        return self._always | {self.best}

    def _tidied_latest(self) -> int | None:
        tidy(self.folder, self._problems.append)
        return max(complete_steps(self.folder), default=None)

    def _set_aside(self, step: int) -> int | None:
        damaged = folder_of(self.folder, step)
        os.replace(damaged, vacant(damaged.with_suffix(".damaged")))
        return max(complete_steps(self.folder), default=None)

    def _save_failed(self, step: int, error: BaseException) -> TrainingError:
        if dist.get_rank(self._group) == 0:
            with contextlib.suppress(OSError):
                clear(partial_of(self.folder, step))  # a full disk needs the room
        kept = ", ".join(map(str, complete_steps(self.folder))) or "none"
        return TrainingError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {_cause(error)}; "
            f"complete checkpoints there: {kept}. Free space or repair the disk, or set "
            "ckpt.save_ckpt_folder to another one; the run resumes from the newest complete checkpoint"
        )


def read(
    checkpoint: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup, *, subset: bool = False
) -> dict[str, Any]:
    """Fill ``tensors`` in place from the folder of one checkpoint; return the state saved with it.

    Args:
        subset: tensors of the checkpoint that are not asked for are passed over, as when only the
            model is wanted and not the optimizer.

    Raises:
        ConfigError: not a checkpoint, or names, shapes or dtypes differ. No tensor was touched.
        TrainingError: a file is missing or damaged. Tensors may be half filled.
    """
    record = on_first_rank(group, lambda: read_record(checkpoint))
    _verify_files(checkpoint, record["files"], group)
    reader = Reader(checkpoint)
    found: list[Metadata] = []
    agree(group, lambda: found.append(reader.read_metadata()))
    (metadata,) = found
    unclaimed = [] if subset else _unclaimed(metadata, tensors, group)
    agree(group, lambda: _check_names(checkpoint, tensors, metadata, unclaimed))
    try:
        dcp.load(dict(tensors), storage_reader=reader, process_group=group)
    except (Exception, dcp.CheckpointException) as error:
        raise TrainingError(f"checkpoint {checkpoint} cannot be read: {_cause(error)}") from error
    return record["state"]


def best_step(folder: Path) -> int | None:
    """The step whose checkpoint has the lowest validation loss, as the newest one there says.

    Raises:
        TrainingError: that one's record is damaged.
    """
    steps = complete_steps(folder)
    progress = read_record(folder_of(folder, steps[-1]))["state"].get("progress", {}) if steps else {}
    return progress.get("best_step")


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The files of a checkpoint with their checksums ("files") and what was saved beside them ("state").

    Raises:
        ConfigError: not a checkpoint.
        TrainingError: the record is damaged.
    """
    try:
        record = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ConfigError(
                f"checkpoint {checkpoint} has format {record['format']}; this version reads {FORMAT}"
            )
        return {"files": dict(record["files"]), "state": dict(record["state"])}
    except (FileNotFoundError, NotADirectoryError) as error:
        steps = complete_steps(checkpoint)
        hint = f"; did you mean {folder_of(checkpoint, steps[-1])}?" if steps else ""
        raise ConfigError(f"{checkpoint} is not a checkpoint: it holds no {STATE_FILE}{hint}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"checkpoint {checkpoint} is damaged: {STATE_FILE}: {error}") from error


def _verify_files(checkpoint: Path, files: Mapping[str, int], group: dist.ProcessGroup) -> None:
    """Compare the checksums of all files, each rank taking a share of them."""

    def verify() -> None:
        share = sorted(files)[dist.get_rank(group) :: dist.get_world_size(group)]
        require_sound(checkpoint, {name: files[name] for name in share})

    agree(group, verify)


def require_sound(checkpoint: Path, files: Mapping[str, int]) -> None:
    """Compare the checksums of these files of a checkpoint.

    Raises:
        TrainingError: naming every file that is missing or damaged.
    """

    def damage(name: str) -> str | None:
        try:
            return None if crc32(checkpoint / name) == files[name] else f"{name}: wrong checksum"
        except OSError as error:
            return f"{name}: {error.strerror}"

    if problems := [problem for problem in map(damage, sorted(files)) if problem]:
        raise TrainingError(f"checkpoint {checkpoint} is damaged: {'; '.join(problems)}")


def _unclaimed(metadata: Metadata, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> list[str]:
    """The tensors of the checkpoint that no rank asks for; a pipeline's ranks each ask for their own."""
    names = sorted(metadata.state_dict_metadata)
    claims = torch.tensor([name in tensors for name in names], dtype=torch.int32)
    dist.all_reduce(claims, op=dist.ReduceOp.MAX, group=group)
    return [name for name, claimed in zip(names, claims.tolist(), strict=True) if not claimed]


def _check_names(
    checkpoint: Path, tensors: Mapping[str, Tensor], metadata: Metadata, unclaimed: Sequence[str]
) -> None:
    saved = metadata.state_dict_metadata
    if any(map(_of_optimizer, tensors)) and not any(map(_of_optimizer, saved)):
        raise ConfigError(
            f"checkpoint {checkpoint} holds the weights alone, without Adam's moments "
            "(ckpt.save_optimizer=false), so the run cannot go on as it was; to go on with fresh ones, set "
            f"ckpt.load_ckpt_info to {{path: {checkpoint}, content: [model, sampler, scheduler]}} and "
            "run.directory to another folder"
        )
    problems = [f"{name} is not in the checkpoint" for name in sorted(tensors.keys() - saved.keys())]
    problems += [f"{name} is not in this model" for name in unclaimed]
    for name in sorted(tensors.keys() & saved.keys()):
        kept, wanted = saved[name], tensors[name]
        if not isinstance(kept, TensorStorageMetadata):
            problems.append(f"{name} is no tensor in the checkpoint")
        elif kept.size != wanted.size():
            problems.append(f"{name} is {list(kept.size)} there and {list(wanted.size())} here")
        elif kept.properties.dtype != wanted.dtype:
            problems.append(f"{name} is {kept.properties.dtype} there and {wanted.dtype} here")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ConfigError(
            f"checkpoint {checkpoint} is not of this model: {'; '.join(problems[:8])}{more}. Use the model "
            "section it was saved with, or another run.directory"
        )


def _of_optimizer(name: str) -> bool:
    return name.startswith("optimizer.")


def _cause(error: BaseException) -> str:
    """One line: which rank failed and with what."""
    if isinstance(error, dcp.CheckpointException):
        failures = sorted(error.failures.items())
        return "; ".join(f"rank {rank}: {type(why).__name__}: {why}" for rank, (why, _) in failures)
    return f"{type(error).__name__}: {error}"
