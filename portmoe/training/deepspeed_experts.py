"""Experts as DeepSpeed gathers them some at a time: stage 3 fetches what a module owns when it is called.

So each run of experts is a module with weights of its own. In a checkpoint they are one tensor again, as
everywhere. What a run keeps for its backward pass is its input: the rest, in which weights would stay whole,
is computed again.
"""

import re
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from portmoe.costs.parameters import spread_modules
from portmoe.model.experts import Experts
from portmoe.model.precision import computed
from portmoe.model.sharing import Cut

_OF_A_RUN = re.compile(r"(.+)\.shards\.\d+\.(\w+)")


def split_experts(model: nn.Module, size: int) -> None:
    """Give every run of ``size`` experts of a layer a module of its own, with its part of the weights."""
    for experts in spread_modules(model):
        weights = {name: weight.detach().split(size) for name, weight in experts.named_parameters()}
        for name in weights:
            delattr(experts, name)
        runs = [dict(zip(weights, parts, strict=True)) for parts in zip(*weights.values(), strict=True)]
        experts.shards = nn.ModuleList(map(_Run, runs))


def whole_name(name: str) -> str:
    """The name of the weight of all experts of which a parameter is a part; others keep theirs."""
    return _OF_A_RUN.sub(r"\1.\2", name)


class _Run(nn.Module):
    cuts: ClassVar[dict[str, Cut]] = Experts.cuts

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.clone()))

    def forward(
        self, compute: Callable[..., torch.Tensor], x: torch.Tensor, ends_E: torch.Tensor | None
    ) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self._compute(compute, x, ends_E)
        return checkpoint(self._compute, compute, x, ends_E, use_reentrant=False, preserve_rng_state=False)

    def _compute(
        self, compute: Callable[..., torch.Tensor], x: torch.Tensor, ends_E: torch.Tensor | None
    ) -> torch.Tensor:
        return compute(x, ends_E, *(computed(weight, x.dtype) for weight in (self.w1, self.w3, self.w2)))
