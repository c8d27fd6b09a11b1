"""The experts of a layer gathered, computed and freed some at a time.

Where parameters are sharded, a block's are gathered together, and 160 experts are most of what a rank then
holds. Here the experts' weights leave the block's group: each run of ``moe.expert_in_one_shard`` experts is
gathered by one collective when its turn has come, forward and again backward, and freed behind it; another
reduces its gradients. (The sharding engine gathers modules. Were each run a module, its weights would be
parameters of their own, and their names in a checkpoint would follow the layout.)

The weights stay one tensor each, cut over the ranks that hold the same experts along a dimension that is not
the experts': so every rank has its part of every run.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from portmoe.costs.parameters import spread_modules
from portmoe.model.decoder import Decoder
from portmoe.model.experts import Experts
from portmoe.model.precision import local_tensor
from portmoe.parallel.mesh import Meshes

# torch 2.13 has new names for them, and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shard(model: Decoder, meshes: Meshes, size: int) -> None:
    """Let every layer with experts of ``model``, on the meta device, compute ``size`` of them at a time."""
    holders = meshes.data if meshes.expert.size() == 1 else meshes.expert_data
    parts = holders.size(-1)
    for experts in spread_modules(model):
        held = len(local_tensor(experts.w1))
        pieces = []
        for name, weight in list(experts.named_parameters()):
            dim = _free_dimension(weight, parts)
            pieces.append(_Piece((size, *local_tensor(weight).shape[1:]), dim, parts))
            if meshes.data.size() > 1:
                setattr(experts, name, _cut(weight, dim, holders))
        experts.shards = [
            _Shard(experts, first, pieces, holders, meshes.data.size()) for first in range(0, held, size)
        ]


def weights_in_shards(model: nn.Module) -> set[nn.Parameter]:
    """The weights that are gathered here and not by the sharding engine."""
    layers = (module for module in model.modules() if getattr(module, "shards", None))
    return {weight for experts in layers for weight in experts.parameters()}


def _free_dimension(weight: nn.Parameter, parts: int) -> int:
    """The dimension to cut: not the experts', nor one that is cut, rather one that divides."""
    taken = {0, *(placement.dim for placement in getattr(weight, "placements", ()))}
    free = [dim for dim in range(weight.ndim) if dim not in taken]
    return next((dim for dim in free if weight.shape[dim] % parts == 0), free[0])


def _cut(weight: nn.Parameter, dim: int, holders: DeviceMesh) -> nn.Parameter:
    """``weight`` cut over the ranks that hold the same experts, beside the cuts it has."""
    mesh, placements = holders, [*[Replicate()] * (holders.ndim - 1), Shard(dim)]
    if isinstance(weight, DTensor):
        mesh = DeviceMesh._concatenate([holders, weight.device_mesh])
        placements += weight.placements
    whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return nn.Parameter(distribute_tensor(whole, mesh, placements, src_data_rank=None))


@dataclass(frozen=True)
class _Piece:
    """A weight of a run of experts, cut along ``dim`` into ``parts``, the last of which may be shorter."""

    shape: tuple[int, ...]
    dim: int
    parts: int

    @property
    def part_shape(self) -> tuple[int, ...]:
        """That of every part, the shorter ones filled up."""
        return (*self.shape[: self.dim], -(-self.shape[self.dim] // self.parts), *self.shape[self.dim + 1 :])

    @property
    def even(self) -> bool:
        return self.shape[self.dim] % self.parts == 0

    def filled_up(self, part: torch.Tensor) -> torch.Tensor:
        """[N]: this rank's part, in the size of all parts."""
        missing = self.part_shape[self.dim] - part.shape[self.dim]
        return (
            F.pad(part, (0, 0) * (part.ndim - 1 - self.dim) + (0, missing)).flatten()
            if missing
            else part.flatten()
        )

    def join(self, part_PN: torch.Tensor, whole: torch.Tensor) -> None:
        """Write all parts, a row each, to the ``whole``."""
        parts = part_PN.unflatten(1, self.part_shape).movedim(0, self.dim)
        if self.even:
            whole.unflatten(self.dim, (self.parts, -1)).copy_(parts)
        else:
            whole.copy_(parts.flatten(self.dim, self.dim + 1).narrow(self.dim, 0, self.shape[self.dim]))

    def separate(self, whole: torch.Tensor, part_PN: torch.Tensor) -> None:
        """Write the ``whole`` to all parts, a row each."""
        missing = self.part_shape[self.dim] * self.parts - self.shape[self.dim]
        if missing:
            whole = F.pad(whole, (0, 0) * (whole.ndim - 1 - self.dim) + (0, missing))
        parts = whole.unflatten(self.dim, (self.parts, -1)).movedim(self.dim, 0)
        part_PN.unflatten(1, self.part_shape).copy_(parts)


class _Shard:
    """A run of experts, whose weights are whole on this rank only while they compute.

    Args:
        experts: the layer's.
        first: the run's first among those on this rank.
        pieces: of its w1, w3 and w2.
        holders: the ranks that hold the same experts, over the last dimension of which the weights are cut.
        ranks: over whose losses a gradient is the mean.
    """

    def __init__(
        self, experts: Experts, first: int, pieces: Sequence[_Piece], holders: DeviceMesh, ranks: int
    ) -> None:
        self._experts, self._pieces, self._ranks = experts, pieces, ranks
        self._here = slice(first, first + pieces[0].shape[0])
        self._parts = holders.size(-1)
        groups = [holders.get_group(dim) for dim in range(holders.ndim) if holders.size(dim) > 1]
        self._shards = groups.pop() if self._parts > 1 else None
        self._replicas = groups
        self._flat: torch.Tensor | None = None  # the whole weights; its memory comes and goes

    def __call__(
        self, compute: Callable[..., torch.Tensor], x: torch.Tensor, ends_E: torch.Tensor | None
    ) -> torch.Tensor:
        weights = _Gathered.apply(self, x.dtype, *self._experts.weights)
        return _Freed.apply(self, compute(x, ends_E, *weights))

    def gather(self, dtype: torch.dtype) -> None:
        """Make the weights whole, in ``dtype``, by one all-gather; nothing where they are."""
        if self._flat is None:
            size = sum(math.prod(piece.shape) for piece in self._pieces)
            self._flat = torch.empty(size, dtype=dtype, device=self._experts.w1.device)
        elif self._flat.untyped_storage().size():
            return
        self._flat.untyped_storage().resize_(self._flat.nbytes)
        own_N = torch.cat(
            [piece.filled_up(part.to(dtype)) for piece, part in self._own(self._experts.weights)]
        )
        all_PN = own_N[None]
        if self._shards is not None:
            all_PN = own_N.new_empty(self._parts, len(own_N))
            _all_gather(all_PN.view(-1), own_N, self._shards)
        for piece, part_PN, whole in zip(self._pieces, self._by_piece(all_PN), self.whole(), strict=True):
            piece.join(part_PN, whole)

    def whole(self) -> list[torch.Tensor]:
        """w1, w3 and w2 in the memory that ``gather`` fills. Each time anew, under version counters of their
        own: what is gathered for the backward pass is what was computed with."""
        sizes = [math.prod(piece.shape) for piece in self._pieces]
        parts = zip(self._flat.split(sizes), self._pieces, strict=True)
        return [part.view(piece.shape).data for part, piece in parts]

    def free(self) -> None:
        """Give the memory of the whole weights back."""
        self._flat.untyped_storage().resize_(0)

    def reduce(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add the mean of all ranks' ``gradients``, in float32, this rank's part of it, to the weights'."""
        width = sum(math.prod(piece.part_shape) for piece in self._pieces)
        all_PN = gradients[0].new_empty(self._parts, width, dtype=torch.float32)
        for piece, gradient, part_PN in zip(self._pieces, gradients, self._by_piece(all_PN), strict=True):
            piece.separate(gradient, part_PN)
        mean_N = all_PN[0]
        if self._shards is not None:
            mean_N = all_PN.new_empty(width)
            _reduce_scatter(mean_N, all_PN.flatten(), group=self._shards)
        for group in self._replicas:
            dist.all_reduce(mean_N, group=group)
        mean_N /= self._ranks
        sums = self._own([_gradient(weight) for weight in self._experts.weights])
        for (piece, part), (mean,) in zip(sums, self._by_piece(mean_N[None]), strict=True):
            part += mean.view(piece.part_shape).narrow(piece.dim, 0, part.shape[piece.dim])

    def _own(self, tensors: Iterable[torch.Tensor]) -> Iterator[tuple[_Piece, torch.Tensor]]:
        """What this rank has of the run, in each of the layer's ``tensors``."""
        for piece, tensor in zip(self._pieces, tensors, strict=True):
            yield piece, local_tensor(tensor.detach())[self._here]

    def _by_piece(self, all_PN: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return all_PN.split([math.prod(piece.part_shape) for piece in self._pieces], dim=1)


def _gradient(weight: nn.Parameter) -> torch.Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class _Gathered(torch.autograd.Function):
    """The whole weights of a run; backward their gradients are reduced, and they are not needed any more."""

    @staticmethod
    def forward(
        ctx: Any, shard: _Shard, dtype: torch.dtype, *weights: nn.Parameter
    ) -> tuple[torch.Tensor, ...]:
        ctx.shard = shard
        shard.gather(dtype)
        return tuple(shard.whole())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        ctx.shard.free()
        ctx.shard.reduce(gradients)
        return (None,) * (2 + len(gradients))


class _Freed(torch.autograd.Function):
    """The identity, of what was computed: behind it the weights are freed, and backward gathered again."""

    @staticmethod
    def forward(ctx: Any, shard: _Shard, y: torch.Tensor) -> torch.Tensor:
        ctx.shard, ctx.dtype = shard, y.dtype
        shard.free()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.shard.gather(ctx.dtype)
        return None, gradient
