"""Causal attention over packed segments, with grouped heads."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from portmoe.families import architecture as arch
from portmoe.model.linear import Linear
from portmoe.model.norm import RMSNorm
from portmoe.model.share import FP32_BYTES, Call, Calls, Costs, PartCost, Share, site
from portmoe.model.sharing import ALL_TOKENS, ALONE, INSIDE, Cut
from portmoe.ops import OpTable, Segments

NORMED = ("queries", "keys")


class Attention(nn.Module):
    """[T,H] → [T,H]: one projection to queries, keys and values, attention, and the output projection.

    The first projection's rows are those of one key head after the other, each with its queries, its key and
    its value: [Nk, G·D + D + Dv] for G queries a key. A slice of them holds whole heads, so how many are here
    is read off the projection's result. Where more ranks than there are key heads share the attention, each
    has its part of a key head's queries, and the key and the value with others.
    """

    part = "attention"  # of a step, as profiles name it
    cuts: ClassVar[dict[str, Cut]] = {
        "qkv.weight": Cut(0),
        "qkv.bias": Cut(0),
        "q_norm.weight": INSIDE,
        "k_norm.weight": INSIDE,
        "out.weight": Cut(1),
        "out.bias": Cut(),
    }

    def __init__(
        self, hidden: int, sizes: arch.Attention, exact_norms: bool, ops: OpTable, where: str = ""
    ) -> None:
        super().__init__()
        self.widths = (sizes.group * sizes.head_dim, sizes.head_dim, sizes.value_dim)  # of one key head
        rows, values = sizes.kv_heads * sum(self.widths), sizes.heads * sizes.value_dim
        self.qkv = Linear(hidden, rows, ops, where, bias=sizes.bias)
        if sizes.norm_epsilon is not None:
            self.q_norm, self.k_norm = (
                RMSNorm(sizes.head_dim, sizes.norm_epsilon, exact_norms, ops, site(where, role))
                for role in NORMED
            )
        self.out = Linear(values, hidden, ops, site(where, "attention's output"), bias=sizes.out_bias)
        self.cuts = type(self).cuts | {
            name: replace(cut, pieces=sizes.kv_heads)
            for name, cut in type(self).cuts.items()
            if name.startswith("qkv.")
        }
        self.sizes = sizes
        self.scale = sizes.head_dim**-0.5
        self.ops = ops.at(where)
        self.key_ops = ops.at(self._of_keys(where))
        self.where = where
        self.region, self.tokens = ALONE, ALL_TOKENS

    def forward(
        self, x_TH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        with self.region.entered(x_TH) as x_TH:
            qkv_TM, widths = self._project(x_TH)
            q_TGD, k_TND, v_TND = qkv_TM.unflatten(-1, (-1, sum(widths))).split(widths, -1)
            q_TND = (
                q_TGD if self.sizes.group == 1 else q_TGD.unflatten(-1, (-1, k_TND.shape[-1])).flatten(1, 2)
            )
            if self.sizes.norm_epsilon is not None:
                q_TND, k_TND = self.q_norm(q_TND), self.k_norm(k_TND)
            q_TND = self.ops.rotary(q_TND, cos_TR, sin_TR, self.sizes.rotary.interleaved)
            k_TND = self.key_ops.rotary(k_TND, cos_TR, sin_TR, self.sizes.rotary.interleaved)
            y_TND = self.tokens.attend(self.ops.attention, q_TND, k_TND, v_TND, segments, self.scale)
            y_TH = self.out(self.tokens.to_tokens(y_TND.flatten(1)))
        return self.region.leave(y_TH)

    def _project(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """This rank's queries, keys and values of all tokens, and their widths in a key head."""
        holders = self.holders(self.region.parts * self.tokens.head_ranks)
        if holders == 1:
            return self.tokens.to_heads(self.qkv(x_TH)), self.widths
        queries, *others = self.widths

        def of_rank(rows_MX: torch.Tensor) -> torch.Tensor:
            head, place = divmod(self.region.rank, holders)
            own_MX = rows_MX.unflatten(0, (-1, sum(self.widths)))[head]
            of_queries_MX, rest_MX = own_MX.split((queries, sum(others)))
            return torch.cat((of_queries_MX.chunk(holders)[place], rest_MX))

        widths = (queries // holders, *others)
        if not self.tokens.split:
            return self.qkv(x_TH, of_rank), widths
        q_TNM, rest_TNM = self.qkv(x_TH).unflatten(1, (-1, sum(self.widths))).split((queries, sum(others)), 2)
        rest_TNPM = rest_TNM.unsqueeze(2).expand(-1, -1, holders, -1)
        qkv_TM = torch.cat((q_TNM.unflatten(2, (holders, -1)), rest_TNPM), -1).flatten(1)
        return self.tokens.to_heads(qkv_TM), widths

    def holders(self, ranks: int) -> int:
        """How many of ``ranks`` that share the heads have the same key head."""
        return max(1, ranks // self.sizes.kv_heads)

    def _of_keys(self, where: str) -> str:
        """The site of the keys' rotary embedding: that of the queries, where there are as many."""
        return where if self.sizes.group == 1 else site(where, "keys")

    def calls(self, share: Share) -> Calls:
        sizes, rotary = self.sizes, self.sizes.rotary
        shared = {"qk_interleaved": rotary.interleaved, "rotary_magnitude": rotary.magnitude}
        heads, kv_heads = sizes.heads // share.ranks, self._kv_heads(share.ranks)
        queries, *others = self.widths
        rows = sizes.kv_heads * queries // share.parts + self._kv_heads(share.parts) * sum(others)
        work = share.workload(share.inside, hidden=self.qkv.in_features, ffn_width=rows)
        yield Call("linear", self.qkv.site, work)
        if sizes.norm_epsilon is not None:
            for role, number in zip(NORMED, (heads, kv_heads), strict=True):
                rows = share.workload(share.attending * number, hidden=sizes.head_dim)
                yield Call("rms_norm", site(self.where, role), rows)
        for where, number in ((self.where, heads), (self._of_keys(self.where), kv_heads)):
            turned = share.workload(share.attending, heads=number, head_dim=sizes.head_dim, **shared)
            yield Call("rotary", where, turned)
        workload = share.of_attention(
            heads=heads,
            head_dim=sizes.head_dim,
            kv_heads=None if sizes.group == 1 else kv_heads,
            value_dim=None if sizes.value_dim == sizes.head_dim else sizes.value_dim,
        )
        yield Call("attention", self.where, workload)
        yield from self.out.call(share, share.inside, inputs=share.parts)

    def costs(self, share: Share) -> Costs:
        sizes, hidden = self.sizes, self.out.out_features
        queries, outputs = sizes.heads * sizes.head_dim, sizes.heads * sizes.value_dim
        of_key = sizes.head_dim + sizes.value_dim
        weights = hidden * ((queries + outputs) / share.parts + self._kv_heads(share.parts) * of_key)
        scores = share.attending * share.attended * (queries + outputs) / share.ranks
        heads = share.attending * ((queries + outputs) / share.ranks + self._kv_heads(share.ranks) * of_key)
        moved = 3 * (weights + 2 * share.inside * hidden + heads)
        yield PartCost("attention", 2 * weights * share.inside + 2 * scores, moved * share.item)

    def kept_bytes(self, share: Share) -> int:
        """Bytes of q, k, v, the output before its projection, and the log-sum-exp."""
        sizes = self.sizes
        heads, kv_heads = sizes.heads // share.ranks, self._kv_heads(share.ranks)
        widths = (heads + kv_heads) * (sizes.head_dim + sizes.value_dim)
        return share.attending * (widths * share.item + FP32_BYTES * heads)

    def _kv_heads(self, ranks: int) -> int:
        """Heads of keys and values on each of ``ranks`` that share them."""
        return max(1, self.sizes.kv_heads // ranks)
