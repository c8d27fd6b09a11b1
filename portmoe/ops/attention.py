"""Causal attention within packed segments."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from portmoe.ops.operation import Operation, Sample, draw, rounding
from portmoe.ops.workload import Workload

GROUPED_HEADS = "fewer heads of k and v than of q"
VALUE_WIDTH = "values of another width than keys"
LOG_SUM = "the logarithm of the softmax's sum as a result"


@dataclass(frozen=True)
class Segments:
    """Where the segments of a pack lie, as host integers: segment i is offsets[i] … offsets[i+1] − 1.

    ``offsets`` starts at 0, rises strictly, and ends at the number of tokens.

    Attributes:
        padded: how many of the last segments are padding, which enters no loss.
    """

    offsets: tuple[int, ...]
    padded: int = 0

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
    def real(self) -> int:
        """The number of tokens that are no padding; they come first."""
        return self.offsets[len(self.offsets) - 1 - self.padded]

    @property
    def real_lengths(self) -> tuple[int, ...]:
        """The lengths of the segments that are no padding."""
        return self.lengths[: len(self.lengths) - self.padded]

    @property
    def equal_length(self) -> int | None:
        """The length all segments share; None if they differ or there is none."""
        lengths = set(self.lengths)
        return lengths.pop() if len(lengths) == 1 else None


def attention(
    q_TND: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGW: torch.Tensor,
    segments: Segments,
    scale: float,
    log_sum: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale · q kᵀ) v, each token attending to itself and the tokens before it in its segment.

    Args:
        q_TND, k_TGD: [T, N, D] and [T, G, D], one floating dtype. N is a multiple of G, and the heads
            n·N/G … (n + 1)·N/G − 1 of q share head n of k and v (Ainslie et al., 2023).
        v_TGW: [T, G, W] in the same dtype; W need not be D.
        segments: with ``segments.total`` = T.
        scale: above 0, usually 1/sqrt(D).
        log_sum: also return the logarithm of each softmax's denominator, by which parts of an attention
            over different keys are put together.

    Returns:
        [T, N, W] in q's dtype; scores, softmax and sums in float32. Memory here grows with N·T².
        With ``log_sum`` also log Σ exp(scale · q·k) over the keys seen, [T, N] float32, differentiable.

    An implementation names in ``handles`` what it takes of GROUPED_HEADS (G < N), VALUE_WIDTH (W ≠ D) and
    LOG_SUM.

    Raises:
        ValueError: the segments do not cover exactly the T tokens.
    """
    check_covers(segments, q_TND)
    wide = torch.promote_types(q_TND.dtype, torch.float32)
    q_NTD, k_GTD, v_GTW = (t.to(wide).transpose(0, 1) for t in (q_TND, k_TGD, v_TGW))
    shared = q_NTD.shape[0] // k_GTD.shape[0]
    k_NTD, v_NTW = (t.repeat_interleave(shared, dim=0) if shared > 1 else t for t in (k_GTD, v_GTW))
    scores_NTT = (q_NTD @ k_NTD.transpose(1, 2)) * scale
    scores_NTT = scores_NTT.masked_fill(~_visible(segments, q_TND.device), -math.inf)
    out_TNW = (torch.softmax(scores_NTT, dim=-1) @ v_NTW).transpose(0, 1).to(q_TND.dtype)
    return (out_TNW, scores_NTT.logsumexp(dim=-1).t()) if log_sum else out_TNW


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
    scale, options = 1 / math.sqrt(workload.head_dim), {"log_sum": True} if workload.log_sum else {}
    groups = workload.kv_heads or workload.heads
    q_shape = (tokens, workload.heads, workload.head_dim)
    k_shape = (tokens, groups, workload.head_dim)
    v_shape = (tokens, groups, workload.value_dim or workload.head_dim)

    def drawn(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(draw(shape, workload, generator) for shape in shapes)

    made = [
        Sample(label, (*drawn(q_shape, k_shape, v_shape), segments, scale), options)
        for label, segments in order
    ]
    # Scores of exactly ±96, whose exponential float32 cannot hold; their gradient would be rounding alone.
    q_TND, k_TGD = torch.zeros(q_shape), torch.zeros(k_shape)
    q_TND[..., 0] = k_TGD[..., 0] = 16
    k_TGD[..., 0] *= torch.randint(2, (tokens, 1), generator=generator) * 2 - 1
    q_TND, k_TGD = (t.to(workload.device, workload.dtype) for t in (q_TND, k_TGD))
    (v_TGW,) = drawn(v_shape)
    return [*made, Sample("large scores", (q_TND, k_TGD, v_TGW, equal, 0.375), options)]


def needs(workload: Workload) -> tuple[str, ...]:
    parts = {
        GROUPED_HEADS: workload.kv_heads not in (None, workload.heads),
        VALUE_WIDTH: workload.value_dim not in (None, workload.head_dim),
        LOG_SUM: workload.log_sum,
    }
    return tuple(part for part, needed in parts.items() if needed)


# In 16-bit types probabilities, their gradient, the output and the result are rounded, which leaves a number
# off by about half an eps of its own token's size. Tokens that see few keys have gradients up to six times as
# large as the root mean square, and the worst of ten thousand numbers lies 4.5 deviations out:
# 6 · 4.5 / 2 = 13.5 eps. In float32 the logarithm of a sum of exponentials carries the rounding of scores
# near 100.
ATTENTION = Operation("attention", attention, samples, rounding(16, sums=16), needs)
