"""SwiGLU's elementwise part (Shazeer, 2020): silu(gate) · up."""

from collections.abc import Sequence

import torch

from portmoe.ops.operation import Operation, Sample, draw, rounding
from portmoe.ops.workload import Workload


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, elementwise, with silu(a) = a · sigmoid(a).

    Args:
        gate_TF, up_TF: the same shape (any) and floating dtype.

    Returns:
        Their shape and dtype; computed in float32 and rounded once.
    """
    gate = gate_TF.to(torch.promote_types(gate_TF.dtype, torch.float32))
    return (gate * torch.sigmoid(gate) * up_TF.to(gate.dtype)).to(gate_TF.dtype)


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    shape = (workload.tokens, workload.ffn_width)
    large = (7, workload.ffn_width)
    return [
        Sample("normal", (draw(shape, workload, generator), draw(shape, workload, generator))),
        Sample(
            "saturated",
            (draw(large, workload, generator, scale=10.0), draw(large, workload, generator)),
        ),
        Sample(  # exp overflows float32
            "far beyond saturation",
            (draw(large, workload, generator, scale=200.0), draw(large, workload, generator)),
        ),
    ]


# silu(gate) may be rounded before the product; the exponential of −a carries |a| roundings of a.
SWIGLU = Operation("swiglu", swiglu, samples, rounding(4, sums=4))
