"""Which box of which tensor of the hub is which box of a part of a parameter."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from portmoe.checkpoint.arrays import Box
from portmoe.families.hub import Made


@dataclass(frozen=True)
class Part:
    """The part of a parameter that is here: where it begins in the whole one, and its size."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many there are."""
        return math.prod(self.size)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Part":
        """Return what this rank holds of ``tensor``, plain or a DTensor."""
        if not isinstance(tensor, DTensor):
            return cls((0,) * tensor.ndim, tuple(tensor.shape))
        size, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return cls(tuple(offset), tuple(size))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of ``tensor``, a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Piece:
    """The same numbers, there in a tensor of the hub and here in a part of a parameter.

    ``here`` has a number in place of a slice where the tensor has a dimension fewer than the parameter.
    """

    tensor: str
    there: Box
    here: tuple[slice | int, ...]


def pieces(made: Made, shape: Sequence[int], part: Part) -> Iterator[Piece]:
    """Yield what ``part`` of a parameter of ``shape`` is made of; the pieces cover it once."""
    if 0 in part.size:
        return
    begin, end = part.offset[0], part.offset[0] + part.size[0]
    beside = [slice(o, o + s) for o, s in zip(part.offset[1:], part.size[1:], strict=True)]
    everything = [slice(0, size) for size in part.size[1:]]
    for run in made.runs(shape):
        first, last = max(begin, run.here), min(end, run.here + run.length)
        if first >= last:
            continue
        if len(run.shape) < len(shape):
            yield Piece(run.tensor, tuple(beside), (first - begin, *everything))
        else:
            shift = run.there - run.here
            there = (slice(first + shift, last + shift), *beside)
            yield Piece(run.tensor, there, (slice(first - begin, last - begin), *everything))


def shapes(made: Mapping[str, Made], parameters: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Hub tensor → its shape, for parameters of these shapes; in the order of the parameters.

    Raises:
        ValueError: the two disagree about names or sizes: a family's ``hf`` is wrong.
    """
    if made.keys() != parameters.keys():
        raise ValueError(
            f"parameters without a place on the hub, or the reverse: {made.keys() ^ parameters.keys()}"
        )
    return {run.tensor: run.shape for name, shape in parameters.items() for run in made[name].runs(shape)}
