"""A linear map whose weights follow the dtype of its input."""

from collections.abc import Callable

import torch
from torch import nn

from portmoe.model.precision import computed
from portmoe.model.share import Call, Calls, Share
from portmoe.ops import OpTable


class Linear(nn.Linear):
    """``torch.nn.Linear`` that computes in the input's dtype: [..., in] → [..., out].

    The values are left uninitialised; ``model.init`` draws them.

    Args:
        site: the call site of its product.
    """

    def __init__(self, inputs: int, outputs: int, ops: OpTable, site: str, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.ops = ops.at(site)
        self.site = site
        self.bias_parts = 1  # ranks that add up their results, each with its part of the bias

    def forward(
        self, input: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The product.

        Args:
            rows: takes of the weight, and of the bias, the rows to compute with; None: all.
        """
        weight = computed(self.weight, input.dtype)
        bias = None if self.bias is None else computed(self.bias, input.dtype)
        if bias is not None and self.bias_parts > 1:
            bias = bias / self.bias_parts
        if rows is not None:
            weight, bias = rows(weight), None if bias is None else rows(bias)
        return self.ops.linear(input, weight, bias)

    def reset_parameters(self) -> None:
        """Draw nothing: torch calls this on construction, and ``model.init`` sets every value anyway."""

    def call(self, share: Share, tokens: int, inputs: int = 1, outputs: int = 1) -> Calls:
        """Its product, with the widths divided over ``inputs`` or ``outputs`` ranks."""
        sizes = {"hidden": self.in_features // inputs, "ffn_width": self.out_features // outputs}
        yield Call("linear", self.site, share.workload(tokens, **sizes))
