"""The dense feed-forward network."""

import torch
from torch import nn

from portmoe.config import Config
from portmoe.model.linear import Linear
from portmoe.ops import OpTable


class FeedForward(nn.Module):
    """SwiGLU, [T,H] → [T,H]: w2(silu(w1 x) · w3 x), no bias."""

    def __init__(self, config: Config, ops: OpTable) -> None:
        super().__init__()
        hidden, width = config.model.hidden_size, config.model.ffn_width
        self.w1 = Linear(hidden, width, ops, bias=False)
        self.w3 = Linear(hidden, width, ops, bias=False)
        self.w2 = Linear(width, hidden, ops, bias=False)
        self.ops = ops

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.w2(self.ops.swiglu(self.w1(x_TH), self.w3(x_TH)))
