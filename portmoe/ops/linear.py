"""A linear map: the product with a weight, and a bias."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from portmoe.ops.operation import Operation, Sample, draw, rounding
from portmoe.ops.workload import Workload


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x weightᵀ + bias.

    Args:
        x_TI: [..., I]; no rows at all are allowed.
        weight_OI: [O, I], x's dtype.
        bias_O: [O], x's dtype; None: none.

    Returns:
        [..., O] in x's dtype. Products of 16-bit types are added up in float32.
    """
    return F.linear(x_TI, weight_OI, bias_O)


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    """Maps of the site's rows from ``hidden`` wide to ``ffn_width``."""
    inner, outer = workload.hidden, workload.ffn_width

    def weight() -> torch.Tensor:
        return draw((outer, inner), workload, generator, scale=1 / math.sqrt(inner))

    def rows(*shape: int) -> torch.Tensor:
        return draw((*shape, inner), workload, generator)

    return [
        Sample("without a bias", (rows(workload.tokens), weight(), None)),
        Sample("with a bias", (rows(workload.tokens), weight(), draw((outer,), workload, generator))),
        Sample("rows in two dimensions", (rows(2, 3), weight(), None)),
    ]


# One product, rounded once; float32 adds up as many terms as the width, the gradients as many as tokens.
LINEAR = Operation("linear", linear, samples, rounding(4, sums=16))
