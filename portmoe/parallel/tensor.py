"""Tensor parallelism: neighbouring ranks share every layer of one micro-batch.

Each rank holds some heads of the attention, part of the width of every network and part of the vocabulary. A
network or an attention is a region: what enters is whole on every rank, what each rank computes there is a
part of a sum, and leaving adds the parts up (Shoeybi et al. 2019, arXiv:1909.08053). Between the regions

* ``mtp``: every rank has all tokens: entering is free and leaving is an all-reduce, and backward the reverse;
* ``msp``: every rank has its share of the tokens, also in norms and residuals: entering gathers them, leaving
  reduces and scatters, and backward the reverse (Korthikanti et al. 2022, arXiv:2205.05198);
* ``fsp``: as ``msp``, but what was gathered is gathered again in the backward pass instead of kept.

Inside a region every rank sees the whole micro-batch, so capacity, slots and drops are those of one process.
Gradients there are parts of a sum too: of the parameters that are not cut, ``sum_gradients`` adds them up,
once a step. ``vocabulary`` has the embedding, the head and the loss.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from portmoe.model.attention import Attention
from portmoe.model.decoder import Block, Decoder
from portmoe.model.feed_forward import FeedForward
from portmoe.model.linear import Linear
from portmoe.model.moe import MoELayer
from portmoe.model.norm import RMSNorm
from portmoe.model.precision import computed, local_tensor
from portmoe.model.router import Router
from portmoe.ops import Routing
from portmoe.parallel.regather import regathered


@dataclass(frozen=True)
class Region:
    """How activations enter and leave the part of a layer that ``mesh``'s ranks share."""

    mesh: DeviceMesh
    outside: Placement  # of the tokens between the regions
    regather: bool = False  # what was gathered to enter is gathered again for the backward pass, not kept

    @classmethod
    def of_mode(cls, mesh: DeviceMesh, mode: str) -> "Region | None":
        """None in ``isp``, where no layer is shared."""
        if mode == "isp":
            return None
        return cls(mesh, Replicate() if mode == "mtp" else Shard(0), regather=mode == "fsp")

    @contextmanager
    def entered(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """All tokens, for what is computed in the ``with`` block."""
        whole = self.enter(x)
        if not (self.regather and whole.requires_grad):
            yield whole
            return
        with regathered(whole, x, self.enter):
            yield whole

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens; the gradients of all ranks are summed on the way back."""
        whole = DTensor.from_local(x, self.mesh, [self.outside], run_check=False)
        return whole.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' ``y``, of this rank's tokens."""
        parts = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[self.outside]).to_local()


def cut(module: nn.Module, name: str, mesh: DeviceMesh, placements: list[Placement]) -> None:
    """Leave this rank its part of a parameter on the meta device, as a DTensor."""
    whole = module.get_parameter(name).detach()
    setattr(module, name, nn.Parameter(distribute_tensor(whole, mesh, placements, src_data_rank=None)))


def share(model: Decoder, region: Region) -> None:
    """Cut attentions and dense networks of ``model``, and make them and the MoE layers regions.

    ``expert.spread`` cuts the experts. A layer that recomputes itself gathers anew in doing so, and what
    it then keeps lives for one backward pass: there ``fsp`` has nothing to save.
    """
    for block in model.layers.values():
        _share_block(block, replace(region, regather=region.regather and not block.recompute))


def _share_block(block: Block, region: Region) -> None:
    for module in list(block.modules()):
        if isinstance(module, Attention):
            for name in ("weight", "bias"):
                cut(module.qkv, name, region.mesh, [Shard(0)])  # rows are head-major: whole heads
            cut(module.out, "weight", region.mesh, [Shard(1)])
            module.out.forward = partial(_linear_part, module.out, region.mesh.size())
            module.forward = partial(_in_region, region, module.forward)
        elif isinstance(module, FeedForward):
            for linear, dim in ((module.w1, 0), (module.w3, 0), (module.w2, 1)):
                cut(linear, "weight", region.mesh, [Shard(dim)])
        elif isinstance(module, MoELayer):
            module.compute = partial(_moe_in_region, region, module.compute)
    if not block.is_moe:
        block.feed_forward.forward = partial(_in_region, region, block.feed_forward.forward)


def _in_region(
    region: Region, compute: Callable[..., torch.Tensor], x: torch.Tensor, *rest: Any
) -> torch.Tensor:
    with region.entered(x) as whole:
        return region.leave(compute(whole, *rest))


def _moe_in_region(
    region: Region,
    compute: Callable[[torch.Tensor, int], tuple[torch.Tensor, Routing]],
    x: torch.Tensor,
    noise_seed: int,
) -> tuple[torch.Tensor, Routing]:
    with region.entered(x) as whole:
        y, routing = compute(whole, noise_seed)
    if routing.aux_loss.requires_grad:
        # Every rank has the whole auxiliary loss, and in here gradients are summed over the ranks.
        routing.aux_loss.register_hook(lambda gradient: gradient / region.mesh.size())
    return region.leave(y), routing


def _linear_part(linear: Linear, parts: int, x: torch.Tensor) -> torch.Tensor:
    """A part of the linear map's result; the bias is not cut, and each rank adds its share of it."""
    product = linear.ops.linear(x, computed(linear.weight, x.dtype), None)
    return product + computed(linear.bias, x.dtype) / parts


def summed_parameters(model: nn.Module, region: Region) -> Iterator[nn.Parameter]:
    """The parameters that every rank holds and of whose gradient it computes only a part."""
    for module in model.modules():
        if isinstance(module, Attention):
            yield module.out.bias
        elif isinstance(module, Router) or (isinstance(module, RMSNorm) and region.outside.is_shard()):
            yield module.weight
        elif isinstance(module, MoELayer) and hasattr(module, "coefficient"):
            yield from module.coefficient.parameters()


def sum_gradients(model: nn.Module, region: Region | None) -> None:
    """Complete the gradients of ``summed_parameters`` after a step's last backward pass: one all-reduce."""
    if region is None or region.mesh.size() == 1:
        return
    gradients = [p.grad for p in summed_parameters(model, region) if p.grad is not None]
    shards = [local_tensor(g) for g in gradients]
    if not shards:
        return
    flat = torch.cat([shard.flatten() for shard in shards])
    dist.all_reduce(flat, group=region.mesh.get_group())
    for shard, summed in zip(shards, flat.split([s.numel() for s in shards]), strict=True):
        shard.copy_(summed.view_as(shard))
