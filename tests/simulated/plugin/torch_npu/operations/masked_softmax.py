"""Attention computed: masks, layouts and the packed form."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from torch_npu.operations.registry import check

Lengths = Sequence[int] | None


class Hidden:
    """Which keys a query does not see. True in a mask means masked OUT; without one no mode does a thing."""

    def __init__(self, mask: torch.Tensor | None, mode: int, before: int, after: int) -> None:
        self.mask, self.mode, self.before, self.after = mask, mode, before, after

    def of(self, rows: int, columns: int) -> torch.Tensor | None:
        if self.mask is None:
            return None
        if self.mode in (0, 1):
            return self.mask.bool()[..., :rows, :columns]
        first = 0 if self.mode == 2 else columns - rows  # the diagonal starts at the top left, or ends below
        distance = torch.arange(columns)[None] - torch.arange(rows)[:, None] - first
        band = (distance > self.after) | (-distance > self.before)
        return (band if self.mode == 4 else distance > 0).to(self.mask.device)


def attention(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    heads: int,
    layout: str,
    ends: tuple[Lengths, Lengths],
    scale: float,
    hidden: Hidden,
    sink: torch.Tensor | None,
    softmax_layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]:
    query, key, value = qkv
    if layout == "TND":
        out, largest, total = _packed(query, key, value, *ends, scale, hidden, sink)
        if softmax_layout != "TND":
            largest, total = (t.transpose(0, 1).contiguous() for t in (largest, total))  # NTD by default
    else:
        width = query.shape[2] // heads if layout in ("BSH", "SBH") else None
        to_bnsd = {
            "BSH": lambda t: t.unflatten(-1, (-1, width)).transpose(1, 2),
            "SBH": lambda t: t.unflatten(-1, (-1, width)).permute(1, 2, 0, 3),
            "BSND": lambda t: t.transpose(1, 2),
            "BNSD": lambda t: t,
        }
        from_bnsd = {
            "BSH": lambda t: t.transpose(1, 2).flatten(2),
            "SBH": lambda t: t.permute(2, 0, 1, 3).flatten(2),
            "BSND": lambda t: t.transpose(1, 2),
            "BNSD": lambda t: t,
        }
        q, k, v = map(to_bnsd[layout], qkv)
        out, largest, total = _attend(q, k, v, hidden, scale, sink)
        out = from_bnsd[layout](out)
    return out.contiguous(), largest, total, torch.empty(0, device=query.device), 0, 0, 0


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_ends: Sequence[int],
    k_ends: Sequence[int],
    scale: float,
    hidden: Hidden,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[T,N,Dv] and twice [T,N,8]; NaN for tokens of sequences that were left out."""
    parts = []
    for (p, q), (j, k) in zip(pairwise([0, *q_ends]), pairwise([0, *k_ends]), strict=True):
        if q > p:
            piece = (query[p:q], key[j:k], value[j:k])
            done = _attend(*(t.transpose(0, 1)[None] for t in piece), hidden, scale, sink)
            parts.append([t[0].transpose(0, 1) for t in done])
    results = [torch.cat(column) for column in zip(*parts, strict=True)]
    left_out = len(query) - len(results[0])
    if left_out:
        results = [torch.cat((t, t.new_full((left_out, *t.shape[1:]), torch.nan))) for t in results]
    return tuple(results)


def _attend(
    q_BNSD: torch.Tensor,
    k_BNSD: torch.Tensor,
    v_BNSD: torch.Tensor,
    hidden: Hidden,
    scale: float,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check(k_BNSD.shape[2] > 0, "attention: a sequence without keys")
    shared = q_BNSD.shape[1] // k_BNSD.shape[1]
    k_BNSD, v_BNSD = (t.repeat_interleave(shared, 1) if shared > 1 else t for t in (k_BNSD, v_BNSD))
    scores = (q_BNSD.float() @ k_BNSD.float().transpose(-1, -2)) * scale
    out_of_sight = hidden.of(*scores.shape[-2:])
    if out_of_sight is not None:
        scores = scores.masked_fill(out_of_sight, -torch.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    if sink is not None:
        largest = torch.maximum(largest, sink.detach()[:, None, None])
    exponentials = torch.exp(scores - largest)
    total = exponentials.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink[:, None, None] - largest)
    out = (exponentials / total) @ v_BNSD.float()
    eightfold = (1, 1, 1, 8)  # the statistics come eight times
    return out.to(q_BNSD.dtype), largest.repeat(eightfold), total.detach().repeat(eightfold)
