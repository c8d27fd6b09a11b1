"""RMSNorm (Zhang and Sennrich, 2019): x / sqrt(mean(x²) + eps) · weight."""

from collections.abc import Sequence

import torch

from portmoe.ops.operation import Operation, Sample, draw, rounding
from portmoe.ops.workload import Workload


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale every row of ``x_TH`` to root mean square one, then by ``weight_H``.

    Args:
        x_TH: [..., H], any floating dtype.
        weight_H: [H], any floating dtype.
        eps: added to the mean square.

    Returns:
        x's shape and dtype; computed in float32 and rounded once.
    """
    x = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale * weight_H.to(x.dtype)).to(x_TH.dtype)


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    x_TH = draw((workload.tokens, workload.hidden), workload, generator)
    weight_H = draw((workload.hidden,), workload, generator)
    tiny_TH = draw((3, workload.hidden), workload, generator, scale=1e-3)  # eps matters here
    large_TH = draw((3, workload.hidden), workload, generator, scale=1e3)  # squares overflow float16
    return [
        Sample("normal", (x_TH, weight_H, 1e-5)),
        Sample("small values", (tiny_TH, weight_H, 1e-5)),
        Sample("large values", (large_TH, weight_H, 1e-5)),
    ]


# Rows are reduced in float32; a few roundings of the result. The weight's gradient sums over tokens.
RMS_NORM = Operation("rms_norm", rms_norm, samples, rounding(4, sums=4))
