"""Cross entropy that never holds more than a slice of the vocabulary's logits.

The vocabulary is walked in slices, keeping a running maximum and sum of exponentials per token
(Milakov and Gimelshein, 2018). The backward pass computes the logits of each slice again, but for the
first few slices, which are kept: a small vocabulary costs no product more than the plain loss. Every
row of the weight's gradient is complete after its slice, so nothing is accumulated in reduced
precision and no float32 copy of that gradient exists.

What is done with a slice's logits is an argument, ``Arithmetic``: a backend may have kernels for it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from portmoe.ops.cross_entropy import IGNORED
from portmoe.ops.products import slow_in

# Of one slice's logits. On the CPU 8 MiB in float32, which stay in the cache; an accelerator wants wide
# products.
SLICE_ELEMENTS = 2**21
ACCELERATOR_SLICE_ELEMENTS = 2**24
KEPT_ELEMENTS = 2**22  # of the slices that are kept for the backward pass


@dataclass
class Statistics:
    """What the loss is made of, per token over the classes seen so far; float32 unless noted."""

    largest_T: torch.Tensor  # logit
    predicted_T: torch.Tensor  # int64, the first class that has it
    exp_sum_T: torch.Tensor  # Σ exp(logit − largest)
    logit_sum_T: torch.Tensor  # Σ logit; 0 without label smoothing
    target_T: torch.Tensor  # the label's logit; 0 where it is none of these classes

    @classmethod
    def of_no_class(cls, labels_T: torch.Tensor, dtype: torch.dtype) -> "Statistics":
        largest_T = torch.full(labels_T.shape, -torch.inf, dtype=dtype, device=labels_T.device)
        return cls(largest_T, torch.zeros_like(labels_T), *(torch.zeros_like(largest_T) for _ in range(3)))


@dataclass(frozen=True)
class Targets:
    """What the logits' gradients are made of besides the logits.

    Attributes:
        log_sum_T: log Σ exp(logit) over all classes there are.
        grad_T: of the loss, float32; 0 where the label is ignored.
        smoothing: taken from the label's class …
        uniform: … and given to every class.
    """

    labels_T: torch.Tensor
    log_sum_T: torch.Tensor
    grad_T: torch.Tensor
    smoothing: float
    uniform: float


class Arithmetic(Protocol):
    """What is done with the logits of the classes from ``start`` on."""

    def add(
        self,
        statistics: Statistics,
        logits_TS: torch.Tensor,
        labels_T: torch.Tensor,
        start: int,
        smoothed: bool,
    ) -> None:
        """Take the slice into ``statistics``, in place."""

    def gradients(
        self, logits_TS: torch.Tensor, start: int, targets: Targets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the loss by the logits: grad · (softmax − smoothed target), in their dtype; and transposed."""


class TorchArithmetic:
    """``Arithmetic`` by torch's operators."""

    def add(
        self,
        statistics: Statistics,
        logits_TS: torch.Tensor,
        labels_T: torch.Tensor,
        start: int,
        smoothed: bool,
    ) -> None:
        s = statistics
        logits_TS = logits_TS.to(s.largest_T.dtype)
        slice_largest_T, slice_predicted_T = logits_TS.max(dim=1)
        s.predicted_T = torch.where(slice_largest_T > s.largest_T, slice_predicted_T + start, s.predicted_T)
        largest_T = torch.maximum(s.largest_T, slice_largest_T)
        place_T, inside_T = _place(labels_T, start, logits_TS.shape[1])
        s.target_T = torch.where(inside_T, logits_TS.gather(1, place_T[:, None])[:, 0], s.target_T)
        if smoothed:
            s.logit_sum_T += logits_TS.sum(dim=1)
        s.exp_sum_T.mul_((s.largest_T - largest_T).exp_())
        s.exp_sum_T.add_(logits_TS.sub(largest_T[:, None]).exp_().sum(dim=1))
        s.largest_T = largest_T

    def gradients(
        self, logits_TS: torch.Tensor, start: int, targets: Targets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_TS = logits_TS.sub(targets.log_sum_T[:, None]).exp_()
        if targets.uniform:
            grad_TS.sub_(targets.uniform)
        grad_TS.mul_(targets.grad_T[:, None])
        place_T, inside_T = _place(targets.labels_T, start, grad_TS.shape[1])
        target_T = torch.where(inside_T, (targets.smoothing - 1) * targets.grad_T, 0.0)
        grad_TS = grad_TS.scatter_add_(1, place_T[:, None], target_T[:, None]).to(logits_TS.dtype)
        return grad_TS, grad_TS.t()


TORCH = TorchArithmetic()


def chunked(arithmetic: Arithmetic) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``cross_entropy`` in memory of order T·H + some slices besides the gradients."""

    def chunked_cross_entropy(
        x_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, label_smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _ChunkedCrossEntropy.apply(x_TH, weight_VH, labels_T, label_smoothing, arithmetic)

    return chunked_cross_entropy


chunked_cross_entropy = chunked(TORCH)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_T: torch.Tensor,
        label_smoothing: float,
        arithmetic: Arithmetic,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        s, kept = slice_statistics(x_TH, weight_VH, labels_T, label_smoothing, arithmetic)
        log_sum_T = s.exp_sum_T.log_().add_(s.largest_T)
        uniform = label_smoothing / weight_VH.shape[0]
        loss_T = log_sum_T - (1 - label_smoothing) * s.target_T - uniform * s.logit_sum_T
        correct_T = s.predicted_T == labels_T
        ctx.save_for_backward(x_TH, weight_VH, labels_T, log_sum_T, *kept)
        ctx.label_smoothing, ctx.arithmetic = label_smoothing, arithmetic
        ctx.mark_non_differentiable(correct_T)
        return loss_T.masked_fill_(labels_T == IGNORED, 0.0), correct_T

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        x_TH, weight_VH, labels_T, log_sum_T, *kept = ctx.saved_tensors
        grad_T = grad_T.masked_fill(labels_T == IGNORED, 0.0)
        uniform = ctx.label_smoothing / weight_VH.shape[0]
        targets = Targets(labels_T, log_sum_T, grad_T, ctx.label_smoothing, uniform)
        wanted = ctx.needs_input_grad[:2]
        return *slice_gradients(x_TH, weight_VH, kept, targets, wanted, ctx.arithmetic), None, None, None


def slice_statistics(
    x_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    label_smoothing: float,
    arithmetic: Arithmetic = TORCH,
) -> tuple[Statistics, list[torch.Tensor]]:
    """Statistics over the classes of ``weight_VH``, and the first slices' logits for ``slice_gradients``."""
    statistics = Statistics.of_no_class(labels_T, torch.promote_types(x_TH.dtype, torch.float32))
    kept = []
    for start, logits_TS in _slices(x_TH, weight_VH):
        if logits_TS.shape[0] * start + logits_TS.numel() <= KEPT_ELEMENTS:
            kept.append(logits_TS)
        arithmetic.add(statistics, logits_TS, labels_T, start, label_smoothing > 0)
    return statistics, kept


def slice_gradients(
    x_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    kept: Sequence[torch.Tensor],
    targets: Targets,
    wanted: tuple[bool, ...],
    arithmetic: Arithmetic = TORCH,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x and of ``weight_VH`` from the classes it has, where ``wanted``.

    ``kept`` are the first slices' logits; the others are computed again.
    """
    wants_x, wants_weight = wanted
    grad_x_TH = torch.zeros_like(x_TH, dtype=targets.log_sum_T.dtype) if wants_x else None
    grad_weight_VH = torch.empty_like(weight_VH) if wants_weight else None
    factor_TH = _factor(x_TH)
    for start, logits_TS in _slices(x_TH, weight_VH, kept):
        grad_TS, grad_ST = map(_factor, arithmetic.gradients(logits_TS, start, targets))
        rows = slice(start, start + len(grad_ST))
        if wants_x and grad_TS.dtype == grad_x_TH.dtype:
            grad_x_TH.addmm_(grad_TS, _factor(weight_VH[rows]))
        elif wants_x:
            grad_x_TH += grad_TS @ weight_VH[rows]
        if wants_weight:
            grad_weight_VH[rows] = grad_ST @ factor_TH
    return grad_x_TH.to(x_TH.dtype) if wants_x else None, grad_weight_VH


def _slices(
    x_TH: torch.Tensor, weight_VH: torch.Tensor, kept: Sequence[torch.Tensor] = ()
) -> Iterator[tuple[int, torch.Tensor]]:
    """The logits slice by slice in x's dtype, with the first class of each; the first ones are ``kept``."""
    elements = SLICE_ELEMENTS if x_TH.device.type == "cpu" else ACCELERATOR_SLICE_ELEMENTS
    width = max(1, elements // max(1, x_TH.shape[0]))
    factor_TH = _factor(x_TH)
    start = 0
    for number, rows_SH in enumerate(weight_VH.split(width)):
        if number < len(kept):
            yield start, kept[number]
        else:
            yield start, F.linear(factor_TH, _factor(rows_SH)).to(x_TH.dtype)
        start += rows_SH.shape[0]


def _factor(t: torch.Tensor) -> torch.Tensor:
    """``t`` as products take it: in float32 where the processor is slow in its dtype."""
    return t.float() if t.device.type == "cpu" and slow_in(t.dtype) else t


def _place(labels_T: torch.Tensor, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each label's column in the slice (clamped into it) and whether it lies there."""
    place_T = labels_T - start
    inside_T = (place_T >= 0) & (place_T < width)
    return place_T.clamp(0, width - 1), inside_T
