"""Checkpoints held to their checksums, to the model, to the steps and to the chain."""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from portmoe.checkpoint.folder import STATE_FILE, complete_steps, crc32, folder_of
from portmoe.checkpoint.storage import Reader
from portmoe.config import Config
from portmoe.costs.parameters import parameter_shapes
from portmoe.errors import TrainingError
from portmoe.record.chain import hash_of
from portmoe.result import Result
from portmoe.verify.evidence.chain import Walk
from portmoe.verify.evidence.directory import Directory

PART = "checkpoints"
OPTIMIZER = "optimizer."
KINDS = ("model", f"{OPTIMIZER}exp_avg", f"{OPTIMIZER}exp_avg_sq")


def check_checkpoints(directory: Directory, walked: Walk) -> Iterator[Result]:
    """Yield what is wrong with any of them, or that one is right."""
    steps = complete_steps(directory.checkpoints)
    if not steps and walked.checkpoints:
        detail = f"none of the {len(walked.checkpoints)} that were saved came with the run: nothing to replay"
        yield Result("warn", "are there", detail, subject="checkpoints", part=PART)
        return
    yield from _missing(directory, walked, steps)
    records = {record["step"]: record for _, record in directory.records}
    shapes = _shapes(directory.config)
    for step in steps:
        name = f"{directory.checkpoints.name}/{folder_of(directory.checkpoints, step).name}"
        checkpoint = _Checkpoint(folder_of(directory.checkpoints, step), name, step)
        problems = list(checkpoint.problems(directory, walked, records, shapes))
        yield from (
            Result("fail", quantity, detail, subject=place, part=PART) for place, quantity, detail in problems
        )
        if not problems:
            detail = "checksums, tensors, state and chain"
            yield Result("pass", "is as written", detail, subject=name, part=PART)


def _missing(directory: Directory, walked: Walk, steps: list[int]) -> Iterator[Result]:
    """Checkpoints that ``ckpt.keep``, ``ckpt.keep_steps`` and ``ckpt.keep_best`` would have left."""
    config = directory.config
    if config is None:
        return
    last = max((record["step"] + 1 for _, record in directory.records), default=0)
    saved = sorted(step for step in walked.checkpoints if step <= last)
    always = [step for step in saved if step in config.ckpt.keep_steps]
    if config.ckpt.keep_best:
        judged = [(record.get("valid_loss"), record["step"] + 1) for _, record in directory.records]
        found = [(loss, step) for loss, step in judged if loss is not None and step in saved]
        always += [step for _, step in sorted(found)[:1] if step not in always]
    newest = [step for step in saved if step not in always][-config.ckpt.keep :]
    for step in {*always, *newest} - set(steps):
        detail = "it was saved, is to be kept, and is not there"
        name = f"{directory.checkpoints.name}/{folder_of(directory.checkpoints, step).name}"
        yield Result("fail", "is there", detail, subject=name, part=PART)


def _shapes(config: Config | None) -> dict[str, tuple[int, ...]]:
    """What the tensors of a checkpoint are called and their shapes; empty where the model is not known."""
    if config is None:
        return {}
    return {f"{kind}.{name}": shape for kind in KINDS for name, shape in parameter_shapes(config).items()}


class _Checkpoint:
    """One of them. ``name``: what reports call it."""

    def __init__(self, folder: Path, name: str, step: int) -> None:
        self._folder, self._name, self._step = folder, name, step

    def problems(
        self,
        directory: Directory,
        walked: Walk,
        records: Mapping[int, Mapping[str, Any]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> Iterator[tuple[str, str, str]]:
        """Yield (place, what is wrong, how)."""
        state_file = f"{self._name}/{STATE_FILE}"
        raw = (self._folder / STATE_FILE).read_bytes()
        try:
            record = json.loads(raw)
            files, state = dict(record["files"]), dict(record["state"])
        except (ValueError, KeyError, TypeError) as error:
            yield state_file, "can be read", repr(error)
            return
        said = walked.checkpoints.get(self._step)
        if walked.starts and said is None:
            if directory.state != "running":
                yield state_file, "is as written", "the chain has no such checkpoint: it was put there later"
        elif said is not None and said != hash_of(raw):
            detail = "it is not what the run wrote: the checkpoint was edited, or is another one's"
            yield state_file, "is as written", detail
        yield from self._state(state_file, record, state, directory, records)
        damaged = [name for name in files if self._damaged(name, files[name])]
        try:
            metadata: Metadata | None = Reader(self._folder).read_metadata()
        except (TrainingError, OSError) as error:
            metadata = None
            yield f"{self._name}/.metadata", "can be read", str(error)
        for name in damaged:
            path = self._folder / name
            there = path.exists()
            detail = f"its checksum is wrong{self._tensors(name, metadata)}" if there else "it is missing"
            yield f"{self._name}/{name}", "is as written", detail
        if metadata is not None and shapes:
            yield from self._names(metadata, shapes)

    def _state(
        self,
        place: str,
        record: Mapping[str, Any],
        state: Mapping[str, Any],
        directory: Directory,
        records: Mapping[int, Mapping[str, Any]],
    ) -> Iterator[tuple[str, str, str]]:
        """Step, tokens, updates and data are those of the run's lines."""
        progress, engine = state.get("progress", {}), state.get("engine", {})
        for what, value in (("step", record.get("step")), ("progress.step", progress.get("step"))):
            if value != self._step:
                yield place, what, f"it is {value}, and the folder's name says {self._step}"
        made = [step for step in records if step < self._step]
        if made and directory.config is not None and directory.config.ckpt.load_ckpt_info is None:
            last = records[max(made)]
            updates = len(made) - (last.get("inf_nan_skip_batches") or 0)
            expected = {
                "progress.consumed_tokens": (
                    progress.get("consumed_tokens"),
                    last.get("num_consumed_tokens"),
                ),
                "engine.updates": (engine.get("updates"), updates),
            }
            for what, (value, by_lines) in expected.items():
                if value != by_lines:
                    yield place, what, f"it is {value}, and by metrics.jsonl {by_lines}"
        data = directory.environment.get("data", {}).get("train")
        changes = directory.config is not None and directory.config.ckpt.allow_changed_data
        if data and state.get("data") and state["data"] != data and not changes:
            yield place, "data", "it is not the data that environment.json names"

    def _damaged(self, name: str, checksum: int) -> bool:
        try:
            return crc32(self._folder / name) != checksum
        except OSError:
            return True

    def _tensors(self, name: str, metadata: Metadata | None) -> str:
        """In words which tensors of a damaged file do not have their own checksums."""
        if metadata is None or not metadata.storage_data:
            return ""
        content = (self._folder / name).read_bytes()
        wrong = []
        for index, where in metadata.storage_data.items():
            if where.relative_path != name:
                continue
            part = content[where.offset : where.offset + where.length]
            try:
                intact = zipfile.ZipFile(io.BytesIO(part)).testzip() is None
            except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError):
                intact = False
            wrong += [] if intact else [index.fqn]
        names = sorted(set(wrong))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f": {', '.join(names[:3])}{more}" if names else ""

    def _names(
        self, metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, str, str]]:
        kept = {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}
        if not any(name.startswith(OPTIMIZER) for name in kept):  # ckpt.save_optimizer: false
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith(OPTIMIZER)}
        for name in sorted(kept.keys() | shapes.keys()):
            if kept.get(name) != shapes.get(name):
                there, wanted = (
                    list(found[name]) if name in found else "not there" for found in (kept, shapes)
                )
                yield self._name, name, f"it is {there}, and of this model {wanted}"
