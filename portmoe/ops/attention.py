"""Causal attention within packed segments."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from portmoe.ops.operation import Operation, Sample, draw, rounding
from portmoe.ops.workload import Workload


@dataclass(frozen=True)
class Segments:
    """Where the segments of a pack lie, as host integers: segment i is offsets[i] … offsets[i+1] − 1.

    ``offsets`` starts at 0, rises strictly, and ends at the number of tokens.
    """

    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.offsets or self.offsets[0] != 0 or any(a >= b for a, b in pairwise(self.offsets)):
            raise ValueError(f"offsets={self.offsets} must start at 0 and rise strictly")

    @property
    def total(self) -> int:
        """T, the number of tokens in all segments."""
        return self.offsets[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.offsets))

    @property
    def equal_length(self) -> int | None:
        """The length all segments share; None if they differ or there is none."""
        lengths = set(self.lengths)
        return lengths.pop() if len(lengths) == 1 else None


def attention(
    q_TND: torch.Tensor, k_TND: torch.Tensor, v_TND: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v, each token attending to itself and the tokens before it in its segment.

    Args:
        q_TND, k_TND, v_TND: [T, N, D], one floating dtype.
        segments: with ``segments.total`` = T.
        scale: above 0, usually 1/sqrt(D).

    Returns:
        [T, N, D] in q's dtype; scores, softmax and sums in float32. Memory here grows with N·T².

    Raises:
        ValueError: the segments do not cover exactly the T tokens.
    """
    check_covers(segments, q_TND)
    wide = torch.promote_types(q_TND.dtype, torch.float32)
    q_NTD, k_NTD, v_NTD = (t.to(wide).transpose(0, 1) for t in (q_TND, k_TND, v_TND))
    scores_NTT = (q_NTD @ k_NTD.transpose(1, 2)) * scale
    hidden_TT = ~_visible(segments, q_TND.device)
    probabilities_NTT = torch.softmax(scores_NTT.masked_fill(hidden_TT, -math.inf), dim=-1)
    return (probabilities_NTT @ v_NTD).transpose(0, 1).to(q_TND.dtype)


def check_covers(segments: Segments, q_TND: torch.Tensor) -> None:
    """Raise ValueError unless the segments cover exactly the tokens of ``q_TND``."""
    if segments.total != q_TND.shape[0]:
        raise ValueError(f"the segments cover {segments.total} tokens, and q has {q_TND.shape[0]}")


def _visible(segments: Segments, device: torch.device) -> torch.Tensor:
    """[T, T] bool: may query (row) see key (column)?"""
    numbers = torch.arange(len(segments.lengths))
    segment_T = numbers.repeat_interleave(torch.tensor(segments.lengths, dtype=torch.int64)).to(device)
    position_T = torch.arange(segments.total, device=device)
    same_TT = segment_T[:, None] == segment_T[None, :]
    return same_TT & (position_T[:, None] >= position_T[None, :])


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    tokens = workload.tokens
    length = min(workload.seq_len, tokens)
    equal = Segments((*range(0, tokens, length), tokens))
    # Lengths 1, 3, 9, … and the rest: unequal, with the shortest possible one among them.
    cuts = [0]
    while cuts[-1] < tokens:
        cuts.append(min(tokens, cuts[-1] * 3 + 1))
    unequal = Segments(tuple(cuts))
    order = [("equal segments", equal), ("unequal segments", unequal)]
    if not workload.equal_segments:
        order.reverse()
    scale = 1 / math.sqrt(workload.head_dim)
    shape = (tokens, workload.heads, workload.head_dim)
    made = [
        Sample(label, (*(draw(shape, workload, generator) for _ in range(3)), segments, scale))
        for label, segments in order
    ]
    # Scores of exactly ±96, whose exponential float32 cannot hold; their gradient would be rounding alone.
    q_TND, k_TND = (torch.zeros(shape) for _ in range(2))
    q_TND[..., 0] = k_TND[..., 0] = 16
    k_TND[..., 0] *= torch.randint(2, (tokens, 1), generator=generator) * 2 - 1
    q_TND, k_TND = (t.to(workload.device, workload.dtype) for t in (q_TND, k_TND))
    v_TND = draw(shape, workload, generator)
    return [*made, Sample("large scores", (q_TND, k_TND, v_TND, equal, 0.375))]


# In 16-bit types probabilities, their gradient, the output and the result are rounded, which leaves a number
# off by about half an eps of its own token's size. Tokens that see few keys have gradients up to six times as
# large as the root mean square, and the worst of ten thousand numbers lies 4.5 deviations out:
# 6 · 4.5 / 2 = 13.5 eps. In float32 the logarithm of a sum of exponentials carries the rounding of scores
# near 100.
ATTENTION = Operation("attention", attention, samples, rounding(16, sums=16))
