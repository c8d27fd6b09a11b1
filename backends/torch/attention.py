"""Attention by torch's scaled dot product attention."""

from collections import defaultdict

import torch
import torch.nn.functional as F

from portmoe.ops.attention import GROUPED_HEADS, VALUE_WIDTH, Segments, check_covers
from portmoe.ops.operation import Implementation


def _sdpa(
    q_TND: torch.Tensor, k_TGD: torch.Tensor, v_TGW: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """One call per length that occurs, without a mask: memory stays linear where the kernel's is."""
    check_covers(segments, q_TND)
    width = v_TGW.shape[-1]
    if width != q_TND.shape[-1]:
        q_TND, k_TGD, v_TGW = as_wide(q_TND, k_TGD, v_TGW)
    if segments.equal_length is not None:
        batch = [t.unflatten(0, (-1, segments.equal_length)) for t in (q_TND, k_TGD, v_TGW)]
        return _sdpa_batch(*batch, scale).flatten(0, 1)[..., :width]
    parts = [t.split(segments.lengths) for t in (q_TND, k_TGD, v_TGW)]
    same_length = defaultdict(list)
    for number, length in enumerate(segments.lengths):
        same_length[length].append(number)
    out: list[torch.Tensor] = [q_TND[:0]] * len(segments.lengths)
    for numbers in same_length.values():
        batch = [torch.stack([part[number] for number in numbers]) for part in parts]
        for number, o_LNW in zip(numbers, _sdpa_batch(*batch, scale).unbind(0), strict=True):
            out[number] = o_LNW
    return (torch.cat(out) if out else q_TND)[..., :width]


def as_wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """All of the widest one's width: zeros change no score, and give columns of zeros that are cut off.

    The kernels whose memory is linear want one width.
    """
    widest = max(t.shape[-1] for t in tensors)
    return [F.pad(t, (0, widest - t.shape[-1])) for t in tensors]


def _sdpa_batch(
    q_BLND: torch.Tensor, k_BLGD: torch.Tensor, v_BLGD: torch.Tensor, scale: float
) -> torch.Tensor:
    q_BNLD, k_BGLD, v_BGLD = (t.transpose(1, 2) for t in (q_BLND, k_BLGD, v_BLGD))
    grouped = q_BNLD.shape[1] != k_BGLD.shape[1]
    o_BNLD = F.scaled_dot_product_attention(
        q_BNLD, k_BGLD, v_BGLD, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return o_BNLD.transpose(1, 2)


ATTENTION_SDPA = Implementation(
    "attention",
    "sdpa",
    _sdpa,
    requested_by="model.use_flash_attn",
    handles=(GROUPED_HEADS, VALUE_WIDTH),
)
