"""A folder of the hub, whole or not there: written by all ranks together, each the parts it holds.

The files are made at their full size first; then every rank writes its numbers in their places, so that no
tensor is gathered. torch's own writer of this format (``HuggingFaceStorageWriter``) takes tensors by their
names and shapes here, and puts shards together by writing everything a second time.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from portmoe.checkpoint.agreement import agree, on_first_rank
from portmoe.checkpoint.arrays import Files
from portmoe.checkpoint.folder import sync_folder
from portmoe.checkpoint.hub_files import INDEX, index_of, plan
from portmoe.checkpoint.hub_layout import Part, local, pieces
from portmoe.checkpoint.upkeep import clear, remove, vacant
from portmoe.errors import TrainingError
from portmoe.families.hub import Made
from portmoe.files import json_text, sync, write_whole


class Target:
    """A folder under way.

    Args:
        final: where it will be; a folder that is there is replaced.
        shapes: of the hub's tensors, in the order they are written.
        dtypes: of each.
        beside: name of a further file → one to copy, or its text.

    Attributes:
        arrays: the place of each tensor.
    """

    def __init__(
        self,
        final: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        beside: Mapping[str, Path | str],
    ) -> None:
        self._final, self._beside = final, beside
        self._partial = final.with_name(f"{final.name}.partial")
        self._files = plan(self._partial, shapes, dtypes)
        self.arrays = {name: array for file in self._files for name, array in file.arrays.items()}

    def begin(self) -> None:
        """Make the files at their full size.

        Raises:
            TrainingError: there is no room for them, or the folder cannot be used.
        """
        with self.explained():
            self._final.parent.mkdir(parents=True, exist_ok=True)
            clear(self._partial)
            needed, free = sum(file.bytes for file in self._files), shutil.disk_usage(self._final.parent).free
            if needed > free:
                raise TrainingError(
                    f"{self._final} needs {needed / 2**30:.2f} GiB and {self._final.parent} has "
                    f"{free / 2**30:.2f} GiB free; free space, or write it elsewhere with `portmoe export`"
                )
            self._partial.mkdir()
            for file in self._files:
                with open(self._partial / file.name, "wb") as opened:
                    opened.write(file.header)
                    opened.truncate(file.bytes)

    @contextmanager
    def filled(self) -> Iterator[Files]:
        """The files, to write ``arrays`` in; on disk at the end.

        Raises:
            TrainingError: they cannot be written.
        """
        with self.explained(), Files(writing=True) as files:
            yield files
            for descriptor in files.descriptors():
                sync(descriptor)

    def finish(self) -> None:
        """Write what lies beside the tensors, and give the folder its name.

        Raises:
            TrainingError: that cannot be done.
        """
        with self.explained():
            if index := index_of(self._files):
                write_whole(self._partial / INDEX, json_text(index, indent=2) + "\n")
            for name, content in self._beside.items():
                if isinstance(content, str):
                    write_whole(self._partial / name, content)
                else:
                    shutil.copyfile(content, self._partial / name)
            sync_folder(self._partial)
            replaced = None
            if os.path.lexists(self._final):
                replaced = vacant(self._final.with_name(f"{self._final.name}.replaced"))
                os.replace(self._final, replaced)
            os.replace(self._partial, self._final)
            sync_folder(self._final.parent)
            remove([replaced] if replaced else [], lambda _: None)

    def abandon(self) -> None:
        """Remove what there is so far; a full disk needs the room."""
        shutil.rmtree(self._partial, ignore_errors=True)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say of what the system refuses where it was to be written."""
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self._final} could not be written: {error.strerror or error}; free space or repair "
                "the disk"
            ) from error


@torch.no_grad()
def write(
    target: Target, parameters: Mapping[str, torch.Tensor], made: Mapping[str, Made], group: dist.ProcessGroup
) -> None:
    """Write ``parameters``, by name, plain or DTensors, of which every rank holds some. Collective.

    Raises:
        TrainingError: it failed on some rank; nothing is left of it then.
    """
    try:
        on_first_rank(group, target.begin)
        agree(group, lambda: _write_parts(target, parameters, made, group))
        on_first_rank(group, target.finish)
    except TrainingError:
        if dist.get_rank(group) == 0:
            target.abandon()
        raise


def _write_parts(
    target: Target, parameters: Mapping[str, torch.Tensor], made: Mapping[str, Made], group: dist.ProcessGroup
) -> None:
    parts = {name: Part.of(parameter) for name, parameter in parameters.items()}
    own = _own(parts, group)
    with target.filled() as files:
        for name, parameter in parameters.items():
            if name in own:
                here = local(parameter.detach())
                for piece in pieces(made[name], parameter.shape, parts[name]):
                    target.arrays[piece.tensor].write(files, piece.there, here[piece.here])


def _own(parts: Mapping[str, Part], group: dist.ProcessGroup) -> set[str]:
    """The parameters whose part this rank writes: of the ranks that hold the same one has least to do."""
    gathered: list[Mapping[str, Part]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(gathered, dict(parts), group=group)
    holders: dict[tuple[str, Part], list[int]] = {}
    for rank, of_rank in enumerate(gathered):
        for item in of_rank.items():
            holders.setdefault(item, []).append(rank)
    load, own, me = [0] * len(gathered), set(), dist.get_rank(group)
    for (name, part), ranks in holders.items():
        writer = min(ranks, key=load.__getitem__)
        load[writer] += part.numbers
        if writer == me:
            own.add(name)
    return own
