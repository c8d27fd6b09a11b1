"""The router's logits: a product in float32, whatever the activations are."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from portmoe.ops.operation import Operation, Sample, draw, rounding
from portmoe.ops.workload import Workload


def router(x_SH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """One logit per token and expert.

    Args:
        x_SH: [S, H], any floating dtype; no number of it is rounded. S = 0 is allowed.
        weight_EH: [E, H] float32, or float64 where x is.

    Returns:
        [S, E] in float32, or float64 where x is: products of full precision, added up in that type.
        The gradient of x has x's dtype, rounded once.
    """
    return F.linear(x_SH.to(torch.promote_types(x_SH.dtype, torch.float32)), weight_EH)


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    def weight() -> torch.Tensor:
        return draw((workload.experts, workload.hidden), workload, generator, dtype=torch.float32)

    shape = (workload.tokens, workload.hidden)
    wide_SH = draw(shape, workload, generator, dtype=torch.float32)  # shows products of reduced precision
    return [
        Sample("normal", (draw(shape, workload, generator), weight())),
        Sample("float32 input", (wide_SH, weight())),
        Sample("one token", (draw((1, workload.hidden), workload, generator), weight())),
    ]


# Sums of up to max(H, E) terms in float32, the weight's gradient of as many as there are tokens.
ROUTER = Operation("router", router, samples, rounding(4, sums=16))
