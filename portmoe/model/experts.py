"""The experts: E SwiGLU networks computed together."""

import torch
from torch import nn

from portmoe.config import Config
from portmoe.model.precision import computed
from portmoe.ops import OpTable


class Experts(nn.Module):
    """The weights of all experts, and the two forms of buffer they work on.

    w1 and w3 are [E,F,H], w2 is [E,H,F]. How many experts are here, and how much of their width, is read
    off the weights, not off the config.
    """

    def __init__(self, config: Config, ops: OpTable) -> None:
        super().__init__()
        experts, hidden, width = config.model.num_experts, config.model.hidden_size, config.model.ffn_width
        self.w1 = nn.Parameter(torch.empty(experts, width, hidden))
        self.w3 = nn.Parameter(torch.empty(experts, width, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, width))
        self.ops = ops

    def forward(self, x: torch.Tensor, ends_E: torch.Tensor | None = None) -> torch.Tensor:
        """The experts' outputs for a buffer of rows.

        Args:
            x: static form [E,C,H]; ragged form [R,H].
            ends_E: ragged form only: expert e owns rows ends[e−1]…ends[e].
        """
        w1_EFH, w3_EFH, w2_EHF = (computed(weight, x.dtype) for weight in (self.w1, self.w3, self.w2))
        if ends_E is None:
            return self.ops.expert_ffn(x, w1_EFH, w3_EFH, w2_EHF)
        return self.ops.expert_ffn_ragged(x, ends_E, w1_EFH, w3_EFH, w2_EHF)
