"""Root mean square norm with a learned gain."""

from typing import ClassVar

import torch
from torch import nn

from portmoe.model.precision import computed
from portmoe.model.share import Call, Calls, Costs, PartCost, Share
from portmoe.model.sharing import BETWEEN, Cut
from portmoe.ops import OpTable


class RMSNorm(nn.Module):
    """[T,H] → [T,H] in the input's dtype; gain [H].

    Args:
        exact: keep the gain and the operation's arguments in float32; otherwise the gain is rounded to the
            dtype of the activations, and only the arithmetic inside the operation is float32.
    """

    part = "norms"  # of a step, as profiles name it
    cuts: ClassVar[dict[str, Cut]] = {"weight": BETWEEN}

    def __init__(self, width: int, eps: float, exact: bool, ops: OpTable, site: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.exact = exact
        self.ops = ops.at(site)
        self.site = site

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if self.exact else x_TH.dtype
        return self.ops.rms_norm(x_TH.to(dtype), computed(self.weight, dtype), self.eps).to(x_TH.dtype)

    def calls(self, share: Share) -> Calls:
        yield Call("rms_norm", self.site, share.workload(share.own, hidden=self.weight.numel()))

    def costs(self, share: Share) -> Costs:
        yield PartCost("norms", 0, 5 * share.own * self.weight.numel() * share.item)
