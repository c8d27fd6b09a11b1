"""Attention by torch's scaled dot product attention."""

from collections import defaultdict

import torch
import torch.nn.functional as F

from portmoe.ops.attention import Segments, check_covers
from portmoe.ops.operation import Implementation


def _sdpa(
    q_TND: torch.Tensor, k_TND: torch.Tensor, v_TND: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """One call per length that occurs, without a mask: memory stays linear where the kernel's is."""
    check_covers(segments, q_TND)
    if segments.equal_length is not None:
        batch = [t.unflatten(0, (-1, segments.equal_length)) for t in (q_TND, k_TND, v_TND)]
        return _sdpa_batch(*batch, scale).flatten(0, 1)
    parts = [t.split(segments.lengths) for t in (q_TND, k_TND, v_TND)]
    same_length = defaultdict(list)
    for number, length in enumerate(segments.lengths):
        same_length[length].append(number)
    out: list[torch.Tensor] = [q_TND[:0]] * len(segments.lengths)
    for numbers in same_length.values():
        batch = [torch.stack([part[number] for number in numbers]) for part in parts]
        for number, o_LND in zip(numbers, _sdpa_batch(*batch, scale).unbind(0), strict=True):
            out[number] = o_LND
    return torch.cat(out) if out else q_TND


def _sdpa_batch(
    q_BLND: torch.Tensor, k_BLND: torch.Tensor, v_BLND: torch.Tensor, scale: float
) -> torch.Tensor:
    q_BNLD, k_BNLD, v_BNLD = (t.transpose(1, 2) for t in (q_BLND, k_BLND, v_BLND))
    o_BNLD = F.scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD, is_causal=True, scale=scale)
    return o_BNLD.transpose(1, 2)


ATTENTION_SDPA = Implementation("attention", "sdpa", _sdpa, requested_by="model.use_flash_attn")
