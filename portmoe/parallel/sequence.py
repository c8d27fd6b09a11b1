"""Sequence parallelism, Ulysses (tensor mode ``isp``): ranks split a micro-batch's tokens, not the weights.

Everything that works token by token stays on a rank's own tokens. Three things look at more of them:

* attention: an all-to-all gives each rank some heads of all tokens, and another brings the results back
  (Jacobs et al. 2023, arXiv:2309.14509);
* routing: capacity, slots, drops and the auxiliary loss are those of the whole micro-batch, or the loss would
  depend on the layout. The router's logits, a few numbers per token, are gathered; every rank routes all
  tokens alike and computes the choices of its own;
* the loss: each token's is gathered, and every rank has the mean of all.

Each rank so differentiates the whole objective, and what was gathered sums the gradients of all ranks on its
way back: the mean over the ranks, which the sharding engine takes, is the gradient of one process.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from portmoe.model.decoder import Decoder
from portmoe.model.sharing import AllTokens
from portmoe.parallel.all_to_all import all_to_all
from portmoe.parallel.tensor import Region


def split(model: Decoder, mesh: DeviceMesh) -> None:
    """Leave each rank of ``mesh`` an equal run of the tokens in every part of ``model``."""
    tokens = OwnTokens(mesh)
    for module in model.modules():
        if isinstance(getattr(module, "tokens", None), AllTokens):
            module.tokens = tokens


class OwnTokens(AllTokens):
    """One rank's run of the tokens, and the ways to the other ranks' and back. T = ranks · t."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._region = Region(mesh, Shard(0))
        self._group = mesh.get_group()
        self.ranks = mesh.size()
        self._rank = mesh.get_local_rank()

    def own(self, whole: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's part [t, …] of what all ranks have of all tokens [T, …]."""
        return whole.chunk(self.ranks, dim)[self._rank]

    def whole_shape(self, own: torch.Tensor) -> tuple[int, ...]:
        return self.ranks * own.shape[0], *own.shape[1:]

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """[t, …] → [T, …]; the gradients of all ranks are summed on the way back."""
        return self._region.enter(own)

    def to_heads(self, x_tM: torch.Tensor) -> torch.Tensor:
        """Own tokens of all heads → all tokens of own heads, [t, ranks·m] → [T, m]."""
        return self._exchange(x_tM.unflatten(1, (self.ranks, -1)).transpose(0, 1)).flatten(0, 1)

    def to_tokens(self, y_Tm: torch.Tensor) -> torch.Tensor:
        """All tokens of own heads → own tokens of all heads, [T, m] → [t, ranks·m]."""
        return self._exchange(y_Tm.unflatten(0, (self.ranks, -1))).transpose(0, 1).flatten(1)

    def _exchange(self, x_Ptm: torch.Tensor) -> torch.Tensor:
        return all_to_all(x_Ptm, self._group)
