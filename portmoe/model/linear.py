"""A linear map whose weights follow the dtype of its input."""

import torch
from torch import nn

from portmoe.model.precision import computed
from portmoe.ops import OpTable


class Linear(nn.Linear):
    """``torch.nn.Linear`` that computes in the input's dtype: [..., in] → [..., out].

    The values are left uninitialised; ``model.init`` draws them.
    """

    def __init__(self, inner: int, outer: int, ops: OpTable, bias: bool = True) -> None:
        super().__init__(inner, outer, bias)
        self.ops = ops

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else computed(self.bias, input.dtype)
        return self.ops.linear(input, computed(self.weight, input.dtype), bias)

    def reset_parameters(self) -> None:
        """Draw nothing: torch calls this on construction, and ``model.init`` sets every value anyway."""
