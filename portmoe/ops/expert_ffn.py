"""The experts' feed-forward networks: w2(silu(w1 x) · w3 x), one set of weights per expert."""

import math
from collections.abc import Sequence

import torch

from portmoe.ops.operation import Operation, Sample, draw, rounding
from portmoe.ops.swiglu import swiglu
from portmoe.ops.workload import Workload


def expert_ffn(
    x_ECH: torch.Tensor, w1_EFH: torch.Tensor, w3_EFH: torch.Tensor, w2_EHF: torch.Tensor
) -> torch.Tensor:
    """Each expert's network over its C rows of the static buffer.

    Args:
        x_ECH: [E, C, H]; C = 0 is allowed.
        w1_EFH, w3_EFH: [E, F, H], gate and up projection. w2_EHF: [E, H, F], down projection. x's dtype.

    Returns:
        [E, C, H] in x's dtype. A zero row gives a zero row.
    """
    gate_ECF = torch.bmm(x_ECH, w1_EFH.transpose(1, 2))
    up_ECF = torch.bmm(x_ECH, w3_EFH.transpose(1, 2))
    return torch.bmm(swiglu(gate_ECF, up_ECF), w2_EHF.transpose(1, 2))


def expert_ffn_ragged(
    x_RH: torch.Tensor,
    ends_E: torch.Tensor,
    w1_EFH: torch.Tensor,
    w3_EFH: torch.Tensor,
    w2_EHF: torch.Tensor,
) -> torch.Tensor:
    """Each expert's network over its own rows of the ragged buffer.

    Args:
        x_RH: [R, H]; R = 0 is allowed.
        ends_E: [E] int64, never falling, the last equal to R: expert e owns rows ends[e−1] … ends[e] − 1,
            possibly none. The reference reads it on the host, which waits for the device.
        w1_EFH, w3_EFH, w2_EHF: as for ``expert_ffn``.

    Returns:
        [R, H] in x's dtype. The weights of an expert without rows get a zero gradient.
    """
    ends = ends_E.tolist()
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    parts = [
        expert_ffn(x_CH[None], w1_FH[None], w3_FH[None], w2_HF[None])[0]
        for x_CH, w1_FH, w3_FH, w2_HF in zip(
            x_RH.split(lengths), w1_EFH.unbind(0), w3_EFH.unbind(0), w2_EHF.unbind(0), strict=True
        )
    ]
    return torch.cat(parts)


def _weights(workload: Workload, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    experts, hidden, width = workload.experts, workload.hidden, workload.ffn_width
    up, down = (experts, width, hidden), (experts, hidden, width)
    # Scaled so that activations stay of order one.
    return (
        draw(up, workload, generator, scale=1 / math.sqrt(hidden)),
        draw(up, workload, generator, scale=1 / math.sqrt(hidden)),
        draw(down, workload, generator, scale=1 / math.sqrt(width)),
    )


def static_samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    capacity = workload.capacity or -(-workload.tokens * workload.top_k // workload.experts)
    x_ECH = draw((workload.experts, capacity, workload.hidden), workload, generator)
    one_E1H = draw((workload.experts, 1, workload.hidden), workload, generator)
    empty_ECH = draw((workload.experts, capacity, workload.hidden), workload, generator)
    with torch.no_grad():
        empty_ECH[0] = 0  # an expert no token went to
    weights = _weights(workload, generator)
    return [
        Sample("full buffer", (x_ECH, *weights)),
        Sample("one row each", (one_E1H, *weights)),
        Sample("an empty expert", (empty_ECH, *weights)),
    ]


def ragged_samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    rows, experts = workload.rows, workload.experts
    if rows is None:
        rows = workload.tokens * workload.top_k
    expert_R = torch.randint(experts, (rows,), generator=generator)
    ends_E = torch.bincount(expert_R, minlength=experts).cumsum(0)
    one_sided_E = torch.full((experts,), rows)  # the first expert has every row, the others none
    last_E = torch.zeros(experts, dtype=torch.int64)  # the last one has
    last_E[-1] = rows
    weights = _weights(workload, generator)
    return [
        Sample(
            label, (draw((rows, workload.hidden), workload, generator), ends.to(workload.device), *weights)
        )
        for label, ends in (
            ("uneven", ends_E),
            ("the first expert has all rows", one_sided_E),
            ("the last expert has all rows", last_E),
        )
    ]


# Three products with their results rounded in between; sums of up to max(H, F, C) terms in float32.
EXPERT_FFN = Operation("expert_ffn", expert_ffn, static_samples, rounding(16, sums=16))
EXPERT_FFN_RAGGED = Operation("expert_ffn_ragged", expert_ffn_ragged, ragged_samples, rounding(16, sums=16))
