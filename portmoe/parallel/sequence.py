"""Sequence parallelism: ranks split a micro-batch's tokens, not the weights.

Everything that works token by token stays on a rank's own tokens. Three things look at more of them:

* attention: among ranks that are ``heads`` of a sequence an all-to-all gives each some heads of all their
  tokens, and another brings the results back (Ulysses: Jacobs et al. 2023, arXiv:2309.14509). Tensor mode
  ``isp`` has no other ranks. With ``parallel.sequence.size`` above the number of key heads there are as many
  such groups as are left over, and keys and values go around them (``parallel.ring``);
* routing: capacity, slots, drops and the auxiliary loss are those of the whole micro-batch, or the loss would
  depend on the layout. The router's logits, a few numbers per token, are gathered; every rank routes all
  tokens alike and computes the choices of its own;
* the loss: each token's is gathered, and every rank has the mean of all.

Each rank so differentiates the whole objective, and what was gathered sums the gradients of all ranks on its
way back: the mean over the ranks, which the sharding engine takes, is the gradient of one process.
"""

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from portmoe.model.decoder import Decoder
from portmoe.model.sharing import AllTokens
from portmoe.ops import Segments
from portmoe.parallel.all_to_all import all_to_all
from portmoe.parallel.mesh import Meshes
from portmoe.parallel.ring import Ring
from portmoe.parallel.tensor import Region


def split(model: Decoder, meshes: Meshes) -> None:
    """Leave each of the ranks of ``meshes.tensor`` an equal part of the tokens in every part of ``model``."""
    tokens = OwnTokens(meshes.tensor, meshes.heads, meshes.ring)
    for module in model.modules():
        if isinstance(getattr(module, "tokens", None), AllTokens):
            module.tokens = tokens


class OwnTokens(AllTokens):
    """One rank's part of the tokens, and the ways to the other ranks' and back. T = ranks · t.

    Where there is a ring of R, the tokens are dealt out to it, as ``parallel.ring`` says; the ranks in one
    place of it have a run each of what that place was dealt, and attend with all of that, [T/R, …].

    Args:
        sequence: the ranks that split the tokens: place by place of the ring, and there rank by rank.
        heads: those in this rank's place of the ring.
        ring: one rank of every place, this one for its own; None: there is one place.
    """

    def __init__(self, sequence: DeviceMesh, heads: DeviceMesh, ring: DeviceMesh | None) -> None:
        self._region, self._heads = Region(sequence, Shard(0)), Region(heads, Shard(0))
        self.ranks, self.head_ranks = sequence.size(), heads.size()
        self._rank = heads.get_local_rank()
        self._ring = None
        if ring is not None:
            self._ring = Ring(ring.get_group(), ring.size(), ring.get_local_rank())

    def own(self, whole: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's part [t, …] of what all ranks have of all tokens [T, …]."""
        return self.attended(whole, dim).chunk(self.head_ranks, dim)[self._rank]

    def whole_shape(self, own: torch.Tensor) -> tuple[int, ...]:
        return self.ranks * own.shape[0], *own.shape[1:]

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """[t, …] → [T, …]; the gradients of all ranks are summed on the way back."""
        dealt = self._region.enter(own)
        if self._ring is None:
            return dealt
        return dealt.unflatten(0, (self._ring.ranks, -1)).transpose(0, 1).flatten(0, 1)

    def attended(self, whole: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """What this rank's place of the ring was dealt, [T/R, …] of [T, …]."""
        if self._ring is None:
            return whole
        dealt = whole.unflatten(dim, (-1, self._ring.ranks))
        return dealt.select(dim + 1, self._ring.rank).contiguous()

    def to_heads(self, x_tM: torch.Tensor) -> torch.Tensor:
        """Own tokens of all heads → attended tokens of own heads, [t, P·m] → [P·t, m] for P ranks."""
        if self.head_ranks == 1:
            return x_tM
        return self._exchange(x_tM.unflatten(1, (self.head_ranks, -1)).transpose(0, 1)).flatten(0, 1)

    def to_every_head(self, x: torch.Tensor) -> torch.Tensor:
        """[t, …] → [P·t, …]; the gradients of these ranks are summed on the way back."""
        return x if self.head_ranks == 1 else self._heads.enter(x)

    def to_tokens(self, y_Tm: torch.Tensor) -> torch.Tensor:
        """Attended tokens of own heads → own tokens of all heads, [P·t, m] → [t, P·m]."""
        if self.head_ranks == 1:
            return y_Tm
        return self._exchange(y_Tm.unflatten(0, (self.head_ranks, -1))).transpose(0, 1).flatten(1)

    def attend(
        self,
        attention: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> torch.Tensor:
        if self._ring is None:
            return attention(q, k, v, segments, scale)
        return self._ring.attend(attention, q, k, v, segments, scale)

    def _exchange(self, x_Ptm: torch.Tensor) -> torch.Tensor:
        return all_to_all(x_Ptm, self._heads.mesh.get_group())
