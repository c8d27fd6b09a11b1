"""Attention by torch_npu's two functions for training.

Both take queries of more heads than keys (their number must divide), and both compute causal attention within
the segments: sparse_mode 2 WITH the compressed mask. Without a mask the mode does nothing, and attention is
full.

``npu_fusion_attention`` asks for values of the keys' shape: narrower ones are widened by zeros, which the
result leaves off. ``npu_fusion_attention_v2`` takes them as they are, and is documented for more products.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from portmoe.ops.attention import Segments, check_covers

COMPRESSED = 2048  # rows and columns of the mask that sparse_mode 2 takes for any length
MOST_SEQUENCES = 1024  # of one call in the TND layout

# q, k, v, layout, scale, cumulative lengths (None: a batch of equal ones) → the attention's output
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str, float, list[int] | None], torch.Tensor]


def fusion_attention(
    q_TND: torch.Tensor, k_TND: torch.Tensor, v_TND: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    width = v_TND.shape[2]
    v_TND = F.pad(v_TND, (0, k_TND.shape[2] - width))
    return _in_segments(_first, q_TND, k_TND, v_TND, segments, scale)[..., :width]


def fusion_attention_v2(
    q_TND: torch.Tensor, k_TND: torch.Tensor, v_TND: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    return _in_segments(_second, q_TND, k_TND, v_TND, segments, scale)


def _in_segments(
    attend: Attend,
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TND: torch.Tensor,
    segments: Segments,
    scale: float,
) -> torch.Tensor:
    """Segments of one length as a batch (BSND), others packed (TND), in as many calls as they need."""
    check_covers(segments, q_TND)
    if segments.equal_length is not None:
        batch = (t.unflatten(0, (-1, segments.equal_length)).contiguous() for t in (q_TND, k_TND, v_TND))
        return attend(*batch, "BSND", scale, None).flatten(0, 1)
    out = []
    for first in range(0, len(segments.lengths), MOST_SEQUENCES):
        offsets = segments.offsets[first : first + MOST_SEQUENCES + 1]
        ends = [end - offsets[0] for end in offsets[1:]]
        pack = (t[offsets[0] : offsets[-1]].contiguous() for t in (q_TND, k_TND, v_TND))
        out.append(attend(*pack, "TND", scale, ends))
    return torch.cat(out) if out else v_TND.new_empty(*q_TND.shape[:2], v_TND.shape[2])


def _first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, scale: float, ends: list[int] | None
) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_fusion_attention(
        q,
        k,
        v,
        q.shape[-2],
        layout,
        atten_mask=_hidden(q.device),
        scale=scale,
        sparse_mode=2,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
    )[0]


def _second(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, scale: float, ends: list[int] | None
) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_fusion_attention_v2(
        q,
        k,
        v,
        q.shape[-2],
        layout,
        atten_mask=_hidden(q.device),
        scale=scale,
        sparse_mode=2,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
    )[0]


@cache
def _hidden(device: torch.device) -> torch.Tensor:
    """The compressed causal mask; True means masked out."""
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu(1)
