"""A training step on two devices, each by itself: how far apart, and from which module on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from portmoe.verify.backend.calls import named_arguments
from portmoe.verify.runs.recording import Call
from portmoe.verify.runs.thresholds import Thresholds


class Step(Protocol):
    """What is compared of a step."""

    model: nn.Module
    calls: Sequence[Call]
    loss: float
    aux_loss: float


@dataclass(frozen=True)
class Whole:
    """The comparison of two steps, relative deviations throughout.

    Attributes:
        gradient: of the parameter whose gradient deviates most, by ``distance``.
        parameter: its name.
        band_forward, band_backward: what is allowed of losses, and of gradients.
        starts: where the first deviation beyond its band was seen, in words; "" if there is none.
        raised: why the second step did not come to an end.
    """

    loss: float = 0.0
    aux_loss: float = 0.0
    gradient: float = 0.0
    parameter: str = ""
    band_forward: float = 0.0
    band_backward: float = 0.0
    starts: str = ""
    raised: str = ""
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def passed(self) -> bool:
        """Whether the whole model ran and stayed within its bands."""
        return not self.raised and not self.starts


def compare_steps(first: Step, second: Step, limits: Thresholds) -> Whole:
    """``second`` beside ``first``, which has the same weights and the same batch.

    Tensors are compared as wholes, by ``distance``: those of the forward pass by the band of the losses,
    gradients by that of the first step's norms by layer.
    """
    forward, backward = limits.loss, limits.first_layer_norm
    loss = _relative(first.loss, second.loss)
    aux_loss = _relative(first.aux_loss, second.aux_loss)
    gradients = dict(_gradients(first.model, second.model))
    parameter = max(gradients, key=gradients.__getitem__)
    notes: list[str] = []
    starts = _first_call_apart(first.calls, second.calls, forward, backward, notes)
    if not starts and not max(loss, aux_loss) <= forward:
        starts = "decoder: the losses"
    if not starts and not notes and not gradients[parameter] <= backward:
        starts = f"{parameter}: its gradient"
    return Whole(loss, aux_loss, gradients[parameter], parameter, forward, backward, starts, notes=notes)


def _first_call_apart(
    first: Sequence[Call], second: Sequence[Call], forward: float, backward: float, notes: list[str]
) -> str:
    for a, b in zip(first, second, strict=False):
        if a.name != b.name:
            return f"{b.name} where the reference has {a.name}"
        given = dict(named_arguments(a.operation, a.sample)), dict(named_arguments(b.operation, b.sample))
        for name, deviation in _deviations(*given):
            if not deviation <= forward:
                return f"{a.name}: its argument {name} is {deviation:.1e} off"
        others = _other_choices(a, b) if a.operation.name.endswith("_gating") else None
        if others:
            return f"{a.name}: {others} tokens go to other experts than their logits say"
        if others is not None:
            notes.append(f"{a.name}: rounding changed choices of experts; nothing after it was compared")
            return ""
        for name, deviation in _deviations(a.outputs, b.outputs):
            if not deviation <= forward:
                return f"{a.name}: its {name} is {deviation:.1e} off"
    for a, b in zip(reversed(first), reversed(second), strict=False):
        for name, deviation in _deviations(a.upstream, b.upstream):
            if not deviation <= backward:
                return f"{a.name}: the gradient that comes back to its {name} is {deviation:.1e} off"
    return ""


def _other_choices(first: Call, second: Call) -> int | None:
    """Tokens whose other choice the logits' difference does not explain; None: all choices are alike."""
    choice_KS, other_KS = (c.outputs["output.expert_KS"].cpu() for c in (first, second))
    differ_S = (choice_KS != other_KS).any(dim=0)
    if not differ_S.any():
        return None
    logits_SE, others_SE = (c.sample.args[0].detach().cpu().double() for c in (first, second))
    best_SK = logits_SE.sort(dim=1, descending=True).values[:, : len(choice_KS) + 1]
    gap_S = (best_SK[:, :-1] - best_SK[:, 1:]).amin(dim=1)
    return int((differ_S & (gap_S > 2 * (others_SE - logits_SE).abs().amax())).sum())


def _deviations(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, float]]:
    """The distance of every floating-point tensor; infinite where the second has none."""
    for name, tensor in first.items():
        if tensor.is_floating_point():
            yield name, distance(tensor, second[name]) if name in second else float("inf")


def _gradients(first: nn.Module, second: nn.Module) -> Iterator[tuple[str, float]]:
    others = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        mine, other = (p.grad for p in (parameter, others[name]))
        if mine is not None or other is not None:
            yield name, float("inf") if mine is None or other is None else distance(mine, other)


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """‖second − first‖ / ‖first‖; 0 for equal ones, infinite where only the first is zero, or for NaN."""
    a, b = first.detach().cpu().double(), second.detach().cpu().double()
    if a.shape != b.shape:
        return float("inf")
    apart, size = (b - a).norm().item(), a.norm().item()
    if apart == 0:
        return 0.0
    found = apart / size if size else float("inf")
    return float("inf") if found != found else found


def _relative(a: float, b: float) -> float:
    return abs(b - a) / abs(a) if a != b and a else float(a != b)
