"""Causal attention with keys and values expanded from a latent (Liu et al. 2024, arXiv:2405.04434)."""

from typing import ClassVar

import torch
from torch import nn

from portmoe.families import architecture as arch
from portmoe.model.linear import Linear
from portmoe.model.norm import RMSNorm
from portmoe.model.share import FP32_BYTES, Call, Calls, Costs, PartCost, Share, site
from portmoe.model.sharing import ALL_TOKENS, ALONE, INSIDE, Cut
from portmoe.ops import OpTable, Segments


class LatentAttention(nn.Module):
    """[T,H] → [T,H].

    Keys and values: [latent | turned] = down(x), one turned key for all heads; up(norm(latent)) has for each
    head [plain key | value]. Queries, for each head [plain | turned]: q(x), or through a latent of their own,
    q_up(norm(q_down(x))). Ranks that share the layer have whole latents and some of the heads.
    """

    part = "attention"  # of a step, as profiles name it
    cuts: ClassVar[dict[str, Cut]] = {
        "q.weight": Cut(0),
        "q_down.weight": INSIDE,
        "q_norm.weight": INSIDE,
        "q_up.weight": Cut(0),
        "down.weight": INSIDE,
        "latent_norm.weight": INSIDE,
        "up.weight": Cut(0),
        "out.weight": Cut(1),
    }

    def __init__(
        self, hidden: int, sizes: arch.LatentAttention, exact_norms: bool, ops: OpTable, where: str = ""
    ) -> None:
        super().__init__()
        queries, expanded = sizes.heads * sizes.head_dim, sizes.heads * (sizes.plain_dim + sizes.value_dim)

        def linear(inputs: int, outputs: int, role: str) -> Linear:
            return Linear(inputs, outputs, ops, site(where, role), bias=False)

        def norm(width: int, role: str) -> RMSNorm:
            return RMSNorm(width, sizes.norm_epsilon, exact_norms, ops, site(where, role))

        if sizes.query_rank is None:
            self.q = linear(hidden, queries, "queries")
        else:
            self.q_down = linear(hidden, sizes.query_rank, "queries' latent")
            self.q_norm = norm(sizes.query_rank, "queries' latent")
            self.q_up = linear(sizes.query_rank, queries, "queries")
        self.down = linear(hidden, sizes.latent_rank + sizes.turned_dim, "latent")
        self.latent_norm = norm(sizes.latent_rank, "latent")
        self.up = linear(sizes.latent_rank, expanded, "keys and values")
        self.out = linear(sizes.heads * sizes.value_dim, hidden, "attention's output")
        self.sizes = sizes
        self.ops, self.key_ops = ops.at(where), ops.at(site(where, "shared key"))
        self.where = where
        self.region, self.tokens = ALONE, ALL_TOKENS

    def forward(
        self, x_TH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        sizes = self.sizes
        with self.region.entered(x_TH) as x_TH:
            latent_TL, turned_TR = self.down(x_TH).split((sizes.latent_rank, sizes.turned_dim), -1)
            expanded_TM = self.up(self.latent_norm(latent_TL.contiguous()))
            q_TND, plain_TNP, v_TNW = self._to_heads(self._queries(x_TH), expanded_TM)
            key_T1R = self.tokens.to_every_head(turned_TR.contiguous()).unsqueeze(1)
            key_T1R = self.key_ops.rotary(key_T1R, cos_TR, sin_TR, sizes.rotary.interleaved)
            q_plain_TNP, q_turned_TNR = q_TND.split((sizes.plain_dim, sizes.turned_dim), -1)
            q_turned_TNR = self.ops.rotary(
                q_turned_TNR.contiguous(), cos_TR, sin_TR, sizes.rotary.interleaved
            )
            q_TND = torch.cat((q_plain_TNP, q_turned_TNR), -1)
            k_TND = torch.cat((plain_TNP, key_T1R.expand(-1, plain_TNP.shape[1], -1)), -1)
            y_TNW = self.tokens.attend(self.ops.attention, q_TND, k_TND, v_TNW, segments, sizes.scale)
            y_TH = self.out(self.tokens.to_tokens(y_TNW.flatten(1)))
        return self.region.leave(y_TH)

    def _queries(self, x_TH: torch.Tensor) -> torch.Tensor:
        if self.sizes.query_rank is None:
            return self.q(x_TH)
        return self.q_up(self.q_norm(self.q_down(x_TH)))

    def _to_heads(
        self, q_TM: torch.Tensor, expanded_TM: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, plain keys and values by head, of the tokens that this rank attends with."""
        sizes = self.sizes
        widths = (sizes.head_dim, sizes.plain_dim, sizes.value_dim)
        q_TND = q_TM.unflatten(-1, (-1, sizes.head_dim))
        expanded_TNM = expanded_TM.unflatten(-1, (-1, sizes.plain_dim + sizes.value_dim))
        if self.tokens.head_ranks == 1:
            return q_TND, *expanded_TNM.split(widths[1:], -1)
        both_TM = self.tokens.to_heads(torch.cat((q_TND, expanded_TNM), -1).flatten(1))
        return both_TM.unflatten(-1, (-1, sum(widths))).split(widths, -1)

    def calls(self, share: Share) -> Calls:
        sizes, tokens, rotary = self.sizes, share.inside, self.sizes.rotary
        heads = sizes.heads // share.ranks
        turned = {"qk_interleaved": rotary.interleaved, "rotary_magnitude": rotary.magnitude}
        if sizes.query_rank is None:
            yield from self.q.call(share, tokens, outputs=share.parts)
        else:
            yield from self.q_down.call(share, tokens)
            yield Call("rms_norm", self.q_norm.site, share.workload(tokens, hidden=sizes.query_rank))
            yield from self.q_up.call(share, tokens, outputs=share.parts)
        yield from self.down.call(share, tokens)
        yield Call("rms_norm", self.latent_norm.site, share.workload(tokens, hidden=sizes.latent_rank))
        yield from self.up.call(share, tokens, outputs=share.parts)
        for where, number in ((self.where, heads), (site(self.where, "shared key"), 1)):
            work = share.workload(share.attending, heads=number, head_dim=sizes.turned_dim, **turned)
            yield Call("rotary", where, work)
        work = share.of_attention(
            heads=heads,
            head_dim=sizes.head_dim,
            value_dim=None if sizes.value_dim == sizes.head_dim else sizes.value_dim,
        )
        yield Call("attention", self.where, work)
        yield from self.out.call(share, tokens, inputs=share.parts)

    def costs(self, share: Share) -> Costs:
        sizes, hidden, tokens = self.sizes, self.out.out_features, share.inside
        rank = sizes.query_rank
        whole = hidden * (sizes.latent_rank + sizes.turned_dim + (rank or 0))
        cut = sizes.heads * (
            (rank or hidden) * sizes.head_dim
            + sizes.latent_rank * (sizes.plain_dim + sizes.value_dim)
            + hidden * sizes.value_dim
        )
        weights = whole + cut / share.parts
        widths = sizes.heads * (sizes.head_dim + sizes.value_dim)
        scores = share.attending * share.attended * widths / share.ranks
        heads = share.attending * 2 * widths / share.ranks  # q, k, v and the output
        moved = 3 * (weights + 2 * tokens * hidden + heads)
        yield PartCost("attention", 2 * weights * tokens + 2 * scores, moved * share.item)

    def kept_bytes(self, share: Share) -> int:
        """Bytes of latents and their norms, q, k, v, the unprojected output, and the log-sum-exp."""
        sizes = self.sizes
        latents = share.inside * 2 * (sizes.latent_rank + (sizes.query_rank or 0)) * share.item
        heads = 2 * sizes.heads * (sizes.head_dim + sizes.value_dim) * share.item // share.ranks
        return latents + share.attending * (heads + FP32_BYTES * sizes.heads // share.ranks)
