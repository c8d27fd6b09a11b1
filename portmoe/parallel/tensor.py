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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from portmoe.model.decoder import Block, Decoder
from portmoe.model.precision import local_tensor
from portmoe.model.sharing import Alone, declared_cuts
from portmoe.parallel.regather import regathered


@dataclass(frozen=True)
class Region(Alone):
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

    @property
    def parts(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

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

    def counted_once(self, loss: torch.Tensor) -> None:
        if loss.requires_grad:  # gradients inside are summed over the ranks
            loss.register_hook(lambda gradient: gradient / self.parts)


def share(model: Decoder, region: Region) -> None:
    """Make every part of ``model`` that declares a region one that the ranks share.

    A region inside another is none: what is around it enters and leaves. A layer that recomputes itself
    gathers anew in doing so, and what it then keeps lives for one backward pass: there ``fsp`` has nothing to
    save.
    """
    for module in model.children():
        _share(module, region)
    _share_biases(model, region)


def _share(module: nn.Module, region: Region) -> None:
    if getattr(module, "region", None) is not None:
        module.region = region
        return
    if isinstance(module, Block) and module.recompute:
        region = replace(region, regather=False)
    for inner in module.children():
        _share(inner, region)


def _share_biases(model: Decoder, region: Region) -> None:
    """Where ranks add up products cut along their inputs, each adds its part of the bias, which is whole."""
    cuts = declared_cuts(model, region.parts)
    for name, cut in cuts.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" and cut.tensor is None and cuts[f"{owner}.weight"].tensor is not None:
            model.get_submodule(owner).bias_parts = region.parts


def summed_parameters(model: nn.Module, region: Region) -> Iterator[nn.Parameter]:
    """The parameters that every rank holds and of whose gradient it computes only a part."""
    for name, cut in declared_cuts(model, region.parts).items():
        if cut.tensor is None and (cut.inside or region.outside.is_shard()):
            yield model.get_parameter(name)


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
