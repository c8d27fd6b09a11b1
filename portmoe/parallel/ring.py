"""Ring attention: queries stay, keys and values go around the ranks (Liu et al. 2023, arXiv:2310.01889).

Of R ranks, rank r has the tokens r, r + R, r + 2R, … of a pack (Brandon et al. 2023, arXiv:2311.09431): every
sample is dealt out evenly, however short it is, so that all ranks have the same causal work in every turn.
Two chunks from both ends of the pack, the zigzag, would be even only where one sample fills the pack.

So dealt, what the queries of one rank see of another's keys is causal attention again: query s sees the keys
0 … s of that rank's part of its sample where these begin no later than the queries, and else 0 … s − 1. Each
turn is the operation ``attention`` itself, on a piece; the results are put together by log Σ exp.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from portmoe.ops import Segments

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Piece(NamedTuple):
    """What one rank's queries see of another's keys: as many of both, and causal attention among them.

    ``queries_P`` and ``keys_P`` are int64 places among the tokens of their ranks; None: all, in order.
    """

    segments: Segments
    queries_P: np.ndarray | None
    keys_P: np.ndarray | None

    def places(self, device: torch.device) -> tuple[torch.Tensor | slice, torch.Tensor | slice]:
        """The queries' and the keys' places, as indices."""
        return tuple(
            slice(None) if places is None else torch.from_numpy(places).to(device, non_blocking=True)
            for places in (self.queries_P, self.keys_P)
        )

    @property
    def pairs(self) -> int:
        """How many (query, key) meet."""
        return sum(length * (length + 1) // 2 for length in self.segments.lengths)


@lru_cache(maxsize=64)
def piece_of(segments: Segments, ranks: int, queries: int, keys: int) -> Piece:
    """The piece of rank ``queries`` with the keys of rank ``keys``, of a pack with these ``segments``."""
    offsets, places = [0], ([], [])
    for start, end in pairwise(segments.offsets):
        (first, first_query, count), (first_key, key, _) = (
            _dealt(start, end, ranks, rank) for rank in (queries, keys)
        )
        if first_key > first:  # the first query here is before every key there
            first_query, count = first_query + 1, count - 1
        if count > 0:
            offsets.append(offsets[-1] + count)
            for found, begin in zip(places, (first_query, key), strict=True):
                found.append(np.arange(begin, begin + count))
    everything = offsets[-1] * ranks == segments.total
    chosen = [None if everything else np.concatenate(found or [np.arange(0)]) for found in places]
    return Piece(Segments(tuple(offsets)), *chosen)


def _dealt(start: int, end: int, ranks: int, rank: int) -> tuple[int, int, int]:
    """Of the tokens start … end − 1 those of ``rank``: the first, its place there, and how many they are."""
    place = -(-(start - rank) // ranks) if start > rank else 0
    first = rank + place * ranks
    return first, place, max(0, -(-(end - first) // ranks))


@dataclass(frozen=True)
class Ring:
    """The ranks that keys and values go around, and the number of this one among them."""

    group: dist.ProcessGroup
    ranks: int
    rank: int

    def attend(
        self,
        attention: Attention,
        q_tND: torch.Tensor,
        k_tGD: torch.Tensor,
        v_tGW: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> torch.Tensor:
        """[t,N,W] of this rank's tokens, as ``attention`` gives them for a whole pack of R · t tokens.

        Collective. Kept for the backward pass are this rank's tokens alone; keys and values go around anew.

        Args:
            attention: the operation; it must take ``log_sum``.
            segments: of the whole pack.
        """
        return _RingAttention.apply(q_tND, k_tGD, v_tGW, self, attention, segments, scale)

    def pieces(self, segments: Segments) -> list[Piece]:
        """The pieces of this rank, turn by turn: with its own keys, then with those of the rank before."""
        return [
            piece_of(segments, self.ranks, self.rank, (self.rank - turn) % self.ranks)
            for turn in range(self.ranks)
        ]

    def pass_on(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Send ``x`` to the next rank, and begin to receive the same from the one before; call to have it."""
        sent, received = [0] * self.ranks, [0] * self.ranks
        sent[(self.rank + 1) % self.ranks] = received[(self.rank - 1) % self.ranks] = len(x)
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        work = dist.all_to_all_single(y, x, received, sent, group=self.group, async_op=True)

        def arrived(kept: torch.Tensor = x) -> torch.Tensor:  # what is sent must stay until it is
            work.wait()
            return y

        return arrived


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_tND: torch.Tensor,
        k_tGD: torch.Tensor,
        v_tGW: torch.Tensor,
        ring: Ring,
        attention: Attention,
        segments: Segments,
        scale: float,
    ) -> torch.Tensor:
        kv_tGX, widths = torch.cat((k_tGD, v_tGW), -1), (k_tGD.shape[-1], v_tGW.shape[-1])
        out_tNW = log_sum_tN = None
        for piece, met_tGX in _around(ring, segments, kv_tGX):
            queries, keys = piece.places(q_tND.device)
            if not piece.pairs:
                continue
            k_PGD, v_PGW = met_tGX[keys].split(widths, -1)
            part_PNW, part_PN = attention(q_tND[queries], k_PGD, v_PGW, piece.segments, scale, log_sum=True)
            if out_tNW is None:  # a rank meets its own keys first, and there every query sees one
                out_tNW, log_sum_tN = part_PNW.to(part_PN.dtype), part_PN
                continue
            before_PN = log_sum_tN[queries]
            both_PN = torch.logaddexp(before_PN, part_PN)
            old_PN1, new_PN1 = ((t - both_PN).exp().unsqueeze(-1) for t in (before_PN, part_PN))
            out_tNW[queries] = out_tNW[queries] * old_PN1 + part_PNW * new_PN1
            log_sum_tN[queries] = both_PN
        out_tNW = out_tNW.to(q_tND.dtype)
        ctx.save_for_backward(q_tND, kv_tGX, out_tNW, log_sum_tN)
        ctx.call, ctx.widths = (ring, attention, segments, scale), widths
        return out_tNW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tNW: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Each piece is computed again, and differentiated as the part of the whole that it is.

        out = Σ w · (a piece's out) with w = exp(the piece's log-sum − that of all): the piece's out has the
        gradient w · grad, and its log-sum w · Σ_W grad · (the piece's out − out). The sum of what all ranks
        find for a rank's keys and values follows them around and comes home a turn after them.
        """
        q_tND, kv_tGX, out_tNW, log_sum_tN = ctx.saved_tensors
        ring, attention, segments, scale = ctx.call
        wide = log_sum_tN.dtype
        grad_tNW = grad_tNW.to(wide)
        of_out_tN = (grad_tNW * out_tNW).sum(-1)
        grad_q_tND, arriving = torch.zeros_like(q_tND, dtype=wide), None
        for piece, met_tGX in _around(ring, segments, kv_tGX):
            found_tGX = torch.zeros_like(kv_tGX, dtype=wide)
            if piece.pairs:
                queries, keys = piece.places(q_tND.device)
                leaves = [
                    t.detach().requires_grad_()
                    for t in (q_tND[queries], *met_tGX[keys].split(ctx.widths, -1))
                ]
                with torch.enable_grad():
                    part_PNW, part_PN = attention(*leaves, piece.segments, scale, log_sum=True)
                share_PN = (part_PN.detach() - log_sum_tN[queries]).exp()
                grad_PNW = grad_tNW[queries]
                of_part_PN = (grad_PNW * part_PNW.detach()).sum(-1)
                grads = (
                    (grad_PNW * share_PN.unsqueeze(-1)).to(part_PNW.dtype),
                    (of_part_PN - of_out_tN[queries]) * share_PN,
                )
                of_q_PND, *of_kv = torch.autograd.grad((part_PNW, part_PN), leaves, grads)
                grad_q_tND[queries] += of_q_PND
                found_tGX[keys] = torch.cat(of_kv, -1).to(wide)
            if arriving is not None:
                found_tGX += arriving()
            arriving = ring.pass_on(found_tGX)
        grad_k_tGD, grad_v_tGW = arriving().to(kv_tGX.dtype).split(ctx.widths, -1)
        return grad_q_tND.to(q_tND.dtype), grad_k_tGD, grad_v_tGW, None, None, None, None


def _around(ring: Ring, segments: Segments, kv_tGX: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Turn by turn the keys and values met and what is seen of them; the next ones travel meanwhile."""
    for turn, piece in enumerate(ring.pieces(segments)):
        arriving = ring.pass_on(kv_tGX) if turn < ring.ranks - 1 else None
        yield piece, kv_tGX
        if arriving is not None:
            kv_tGX = arriving()
