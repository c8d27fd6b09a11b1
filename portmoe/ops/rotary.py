"""Rotary position embedding (Su et al., 2021)."""

from collections.abc import Sequence

import torch

from portmoe.ops.operation import Operation, Sample, draw, rounding
from portmoe.ops.workload import Workload


def rotary(
    x_TND: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate each pair (a, b) of a head to (a·cos − b·sin, b·cos + a·sin).

    Args:
        x_TND: [T, N, D], D even.
        cos_TR, sin_TR: [T, R] with R = D/2, float32, one angle per token and pair; not differentiable.
        interleaved: pair r is (x[2r], x[2r+1]); otherwise (x[r], x[r+R]).

    Returns:
        [T, N, D] in x's dtype; computed in float32 and rounded once.
    """
    x = x_TND.to(torch.promote_types(x_TND.dtype, torch.float32))
    cos_T1R, sin_T1R = cos_TR.to(x.dtype).unsqueeze(1), sin_TR.to(x.dtype).unsqueeze(1)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    rotated = (first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R)
    joined = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return joined.to(x_TND.dtype)


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    configured = workload.qk_interleaved
    cases = [("configured pairing", workload.tokens, configured), ("other pairing", 5, not configured)]
    made = []
    for label, tokens, interleaved in cases:
        x_TND = draw((tokens, workload.heads, workload.head_dim), workload, generator)
        angle_TR = torch.rand(tokens, workload.head_dim // 2, generator=generator).mul(100)
        magnitude = workload.rotary_magnitude
        table = tuple((magnitude * of_TR).to(workload.device) for of_TR in (angle_TR.cos(), angle_TR.sin()))
        made.append(Sample(label, (x_TND, *table, interleaved)))
    return made


# Two products and a sum in float32, one rounding; cancellation is measured against the tensor's scale.
ROTARY = Operation("rotary", rotary, samples, rounding(2, sums=4))
