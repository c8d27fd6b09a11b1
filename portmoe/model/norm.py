"""Root mean square norm with a learned gain."""

import torch
from torch import nn

from portmoe.config import Config
from portmoe.model.precision import computed
from portmoe.ops import OpTable


class RMSNorm(nn.Module):
    """[T,H] → [T,H] in the input's dtype; gain [H].

    ``use_fp32_norm`` keeps the gain and the operation's arguments in float32; otherwise the gain is
    rounded to the dtype of the activations, and only the arithmetic inside the operation is float32.
    """

    def __init__(self, config: Config, ops: OpTable) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.model.hidden_size))
        self.eps = config.model.layer_norm_epsilon
        self.exact = config.use_fp32_norm
        self.ops = ops

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if self.exact else x_TH.dtype
        return self.ops.rms_norm(x_TH.to(dtype), computed(self.weight, dtype), self.eps).to(x_TH.dtype)
