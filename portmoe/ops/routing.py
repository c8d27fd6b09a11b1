"""Where each token goes: the result of gating, and how choices become slots and rows."""

from dataclasses import dataclass

import torch
from torch.utils import _pytree

from portmoe.ops.workload import Workload


@dataclass(frozen=True, eq=False)
class Routing:
    """The k choices of each of S tokens among E experts, first choice first.

    Choice (k, s) is *kept* if its slot is below ``capacity`` and *dropped* otherwise. Slots are
    distinct within an expert and fill it from 0, dropped choices included.

    Attributes:
        expert_KS: int64, the expert chosen.
        slot_KS: int64, the place in that expert; ≥ ``capacity`` means dropped.
        weight_KS: float32, the weight of that expert's output; 0 where dropped. Differentiable.
        capacity: C, rows an expert has in the static buffer.
        aux_loss: float32 scalar, the load-balancing loss. Differentiable.
        count_E: int64, choices of each expert before drops; they add up to K·S.
        score_SE: float32, every expert's score, from a gate that leaves it to others to judge how even the
            load is. Differentiable.
    """

    expert_KS: torch.Tensor
    slot_KS: torch.Tensor
    weight_KS: torch.Tensor
    capacity: int
    aux_loss: torch.Tensor
    count_E: torch.Tensor
    score_SE: torch.Tensor | None = None

    @property
    def kept_KS(self) -> torch.Tensor:
        """bool: the choice is computed."""
        return self.slot_KS < self.capacity

    @property
    def static_rows(self) -> int:
        """E·C, the rows of the static buffer: expert e owns rows e·C … (e+1)·C − 1."""
        return self.count_E.numel() * self.capacity

    @property
    def static_row_KS(self) -> torch.Tensor:
        """int64, each choice's row of the static buffer; ``static_rows`` where dropped."""
        row_KS = self.expert_KS * self.capacity + self.slot_KS
        return torch.where(self.kept_KS, row_KS, self.static_rows)

    @property
    def ragged_rows(self) -> int:
        """K·S, the rows of the ragged buffer: one per choice, dropped or not."""
        return self.expert_KS.numel()

    @property
    def ragged_row_KS(self) -> torch.Tensor:
        """int64, each choice's row of the ragged buffer; ``ragged_rows`` where dropped."""
        start_E = self.ends_E - self.count_E
        return torch.where(self.kept_KS, start_E[self.expert_KS] + self.slot_KS, self.ragged_rows)

    @property
    def ends_E(self) -> torch.Tensor:
        """int64: expert e owns rows ends[e−1] … ends[e] − 1 of the ragged buffer."""
        return self.count_E.cumsum(0)


# Lets generic code (timing, conformance, checkpointing) find the tensors in a Routing.
_pytree.register_dataclass(Routing)


def gating_logits(workload: Workload, generator: torch.Generator, tokens: int | None = None) -> torch.Tensor:
    """Sample logits [S, E], float32 multiples of 2⁻¹⁰: equal or well apart, so that no rounding decides."""
    shape = (workload.tokens if tokens is None else tokens, workload.experts)
    logits_SE = torch.randn(shape, generator=generator).mul_(1024).round_().div_(1024)
    return logits_SE.to(workload.device).requires_grad_()


def check_choices(logits_SE: torch.Tensor, k: int) -> None:
    """Raise ValueError unless ``logits_SE`` is a matrix from whose columns k can be chosen."""
    if logits_SE.dim() != 2 or not 1 <= k <= logits_SE.shape[1]:
        raise ValueError(
            f"k={k} and logits of shape {tuple(logits_SE.shape)}: logits must be [S, E] with 1 ≤ k ≤ E"
        )
