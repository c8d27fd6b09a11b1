"""The experts: E SwiGLU networks computed together."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from portmoe.model.precision import computed
from portmoe.model.sharing import Cut, compute_here
from portmoe.ops import OpTable


class Experts(nn.Module):
    """The weights of all experts, and the two forms of buffer they work on.

    w1 and w3 are [E,F,H], w2 is [E,H,F]. How many experts are here, and how much of their width, is read
    off the weights.

    Args:
        even: the static buffer has the same capacity on every rank: it does not follow the routing.

    Attributes:
        exchange: called with what computes the experts that are here and the arguments of ``forward``.
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

    def forward(self, x: torch.Tensor, ends_E: torch.Tensor | None = None) -> torch.Tensor:
        """The experts' outputs for a buffer of rows.

        Args:
            x: static form [E,C,H]; ragged form [R,H].
            ends_E: ragged form only: expert e owns rows ends[e−1]…ends[e].
        """
        return self.exchange(self._compute, x, ends_E)

    def _compute(self, x: torch.Tensor, ends_E: torch.Tensor | None = None) -> torch.Tensor:
        w1_EFH, w3_EFH, w2_EHF = (computed(weight, x.dtype) for weight in (self.w1, self.w3, self.w2))
        if ends_E is None:
            return self.ops.expert_ffn(x, w1_EFH, w3_EFH, w2_EHF)
        return self.ops.expert_ffn_ragged(x, ends_E, w1_EFH, w3_EFH, w2_EHF)
