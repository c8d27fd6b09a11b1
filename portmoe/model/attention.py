"""Causal multi-head attention over packed segments."""

import torch
from torch import nn

from portmoe.config import Config
from portmoe.model.linear import Linear
from portmoe.ops import OpTable, Segments


class Attention(nn.Module):
    """[T,H] → [T,H]: fused qkv projection and output projection, both with bias.

    The rows of the qkv projection are head-major, [N,3,D]: a slice of them holds whole heads, so the
    number of heads is read off the projection's result and not off the config.
    """

    def __init__(self, config: Config, ops: OpTable) -> None:
        super().__init__()
        model = config.model
        self.qkv = Linear(model.hidden_size, 3 * model.hidden_size, ops)
        self.out = Linear(model.hidden_size, model.hidden_size, ops)
        self.head_dim = model.head_dim
        self.scale = model.head_dim**-0.5
        self.interleaved = model.qk_interleaved
        self.ops = ops

    def forward(
        self, x_TH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        qkv_TN3D = self.qkv(x_TH).unflatten(-1, (-1, 3, self.head_dim))
        q_TND, k_TND, v_TND = qkv_TN3D.unbind(2)
        q_TND = self.ops.rotary(q_TND, cos_TR, sin_TR, self.interleaved)
        k_TND = self.ops.rotary(k_TND, cos_TR, sin_TR, self.interleaved)
        y_TND = self.ops.attention(q_TND, k_TND, v_TND, segments, self.scale)
        return self.out(y_TND.flatten(1))
