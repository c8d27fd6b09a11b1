"""The experts: E SwiGLU networks computed together."""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import nn

from portmoe.model.precision import computed
from portmoe.model.sharing import Cut, compute_here
from portmoe.ops import OpTable

# Of some experts: called with what computes networks (rows, ends, w1, w3, w2), and their rows and ends.
Shard = Callable[[Callable[..., torch.Tensor], torch.Tensor, torch.Tensor | None], torch.Tensor]


class Experts(nn.Module):
    """The weights of all experts, and the two forms of buffer they work on.

    w1 and w3 are [E,F,H], w2 is [E,H,F]. How many experts are here, and how much of their width, is read
    off the weights.

    Args:
        even: the static buffer has the same capacity on every rank: it does not follow the routing.

    Attributes:
        exchange: called with what computes the experts that are here and the arguments of ``forward``.
        shards: of the experts here, in order, equally many each: what calls its argument with their weights,
            which are whole only meanwhile. None: one call with the weights of all.
    """

    part = "experts"  # of a step, as profiles name it
    cuts: ClassVar[dict[str, Cut]] = {
        "w1": Cut(tensor=1, expert=0),
        "w3": Cut(tensor=1, expert=0),
        "w2": Cut(tensor=2, expert=0),
    }

    def __init__(self, count: int, hidden: int, width: int, ops: OpTable, even: bool = True) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(count, width, hidden))
        self.w3 = nn.Parameter(torch.empty(count, width, hidden))
        self.w2 = nn.Parameter(torch.empty(count, hidden, width))
        self.ops = ops
        self.even = even
        self.exchange: Callable[..., torch.Tensor] = compute_here
        self.shards: Sequence[Shard] | None = None

    def forward(self, x: torch.Tensor, ends_E: torch.Tensor | None = None) -> torch.Tensor:
        """The experts' outputs for a buffer of rows.

        Args:
            x: static form [E,C,H]; ragged form [R,H].
            ends_E: ragged form only: expert e owns rows ends[e−1]…ends[e].
        """
        return self.exchange(self._compute, x, ends_E)

    def _compute(self, x: torch.Tensor, ends_E: torch.Tensor | None = None) -> torch.Tensor:
        if self.shards is None:
            return self._networks(x, ends_E, *(computed(weight, x.dtype) for weight in self.weights))
        if ends_E is None:
            buffers = ((x_ECH, None) for x_ECH in x.chunk(len(self.shards)))
        else:
            buffers = _ragged_parts(x, ends_E, len(self.shards))
        return torch.cat([shard(self._networks, *b) for shard, b in zip(self.shards, buffers, strict=True)])

    @property
    def weights(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """w1, w3, w2."""
        return self.w1, self.w3, self.w2

    def _networks(self, x: torch.Tensor, ends_E: torch.Tensor | None, *weights: torch.Tensor) -> torch.Tensor:
        if ends_E is None:
            return self.ops.expert_ffn(x, *weights)
        return self.ops.expert_ffn_ragged(x, ends_E, *weights)


def _ragged_parts(
    x_RH: torch.Tensor, ends_E: torch.Tensor, parts: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The ragged buffer of each of ``parts`` runs of as many experts. Waits for the device."""
    ends_PE = ends_E.view(parts, -1)
    ends = ends_PE[:, -1].tolist()
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    firsts = [0, *ends][:-1]
    for rows_RH, first, own_E in zip(x_RH.split(lengths), firsts, ends_PE.unbind(0), strict=True):
        yield rows_RH, own_E - first
