"""The router: one float32 logit per token and expert."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from portmoe.model.precision import computed
from portmoe.model.sharing import ALL_TOKENS, INSIDE, Cut
from portmoe.ops import OpTable

JITTER = 0.01  # half-width of the multiplicative noise of noisy_gate_policy "Jitter"


class Router(nn.Module):
    """[S,H] in any dtype → logits [S,E] in float32. The weight [E,H] stays float32.

    It returns a plain tensor, and the choice of experts is made outside, so that a sharding engine
    that hooks modules sees where the gradient comes in.
    """

    part = "router"  # of a step, as profiles name it
    cuts: ClassVar[dict[str, Cut]] = {"weight": INSIDE}
    exact = True

    def __init__(self, experts: int, hidden: int, ops: OpTable) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.ops = ops
        self.tokens = ALL_TOKENS

    def forward(self, x_SH: torch.Tensor, jitter: torch.Generator | None = None) -> torch.Tensor:
        """``jitter``: a CPU generator the input's noise U(0.99, 1.01) is drawn from; None: no noise."""
        if jitter is not None:
            noise_SH = self.tokens.own(jitter_noise(self.tokens.whole_shape(x_SH), jitter))
            x_SH = x_SH.to(torch.promote_types(x_SH.dtype, torch.float32)) * noise_SH.to(x_SH.device)
        return self.ops.router(x_SH, computed(self.weight, torch.float32))


def jitter_noise(
    shape: Sequence[int], generator: torch.Generator, half_width: float = JITTER
) -> torch.Tensor:
    """U(1 − half_width, 1 + half_width), float32, on the CPU as ``generator`` is."""
    noise = torch.empty(shape, dtype=torch.float32)
    return noise.uniform_(1.0 - half_width, 1.0 + half_width, generator=generator)
