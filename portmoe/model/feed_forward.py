"""The dense feed-forward network."""

from typing import ClassVar

import torch
from torch import nn

from portmoe.model.linear import Linear
from portmoe.model.share import Call, Calls, Costs, PartCost, Share, site
from portmoe.model.sharing import ALONE, Cut
from portmoe.ops import OpTable


class FeedForward(nn.Module):
    """SwiGLU, [T,H] → [T,H]: w2(silu(w1 x) · w3 x), no bias."""

    part = "dense network"  # of a step, as profiles name it
    cuts: ClassVar[dict[str, Cut]] = {"w1.weight": Cut(0), "w3.weight": Cut(0), "w2.weight": Cut(1)}

    def __init__(self, hidden: int, width: int, ops: OpTable, where: str = "") -> None:
        super().__init__()
        self.w1 = Linear(hidden, width, ops, site(where, "gate and up"), bias=False)
        self.w3 = Linear(hidden, width, ops, site(where, "gate and up"), bias=False)
        self.w2 = Linear(width, hidden, ops, site(where, "down"), bias=False)
        self.hidden, self.width = hidden, width
        self.ops = ops.at(where)
        self.where = where
        self.region = ALONE

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        with self.region.entered(x_TH) as x_TH:
            y_TH = self.w2(self.ops.swiglu(self.w1(x_TH), self.w3(x_TH)))
        return self.region.leave(y_TH)

    def calls(self, share: Share) -> Calls:
        yield from self.w1.call(share, share.inside, outputs=share.parts)
        swiglu = share.workload(share.inside, ffn_width=self.width // share.parts)
        yield Call("swiglu", self.where, swiglu)
        yield from self.w2.call(share, share.inside, inputs=share.parts)

    def costs(self, share: Share) -> Costs:
        weights = 3 * self.hidden * self.width // share.parts
        moved = 3 * weights + 4 * share.inside * self.hidden  # weights twice and their gradient; rows
        yield PartCost("dense network", 2 * weights * share.inside, moved * share.item)

    def kept_bytes(self, share: Share) -> int:
        """Bytes of gate, up and their product."""
        return share.inside * (3 * self.width * share.item // share.parts)
