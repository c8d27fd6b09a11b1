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
from typing import Any

import torch
import torch.nn.functional as F

from portmoe.ops.cross_entropy import (
    CUT_VOCABULARY,
    IGNORED,
    KEPT_LOGITS,
    Arithmetic,
    CutVocabulary,
    Statistics,
    Targets,
)
from portmoe.ops.operation import Implementation

SLICE_LOGITS = 2**24  # of one slice: products as wide as an accelerator wants them

Factor = Callable[[torch.Tensor], torch.Tensor]


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


def _as_it_is(t: torch.Tensor) -> torch.Tensor:
    return t


@dataclass
class ChunkedCrossEntropy:
    """``cross_entropy`` in memory of order T·H + some slices besides the gradients, cut or whole.

    Attributes:
        arithmetic: what is done with a slice's logits.
        slice_logits: how many a slice has.
        factor: a tensor as products take it, in a dtype that the device multiplies.
    """

    arithmetic: Arithmetic = TORCH
    slice_logits: int = SLICE_LOGITS
    factor: Factor = _as_it_is

    def __call__(
        self,
        x_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_T: torch.Tensor,
        label_smoothing: float,
        cut: CutVocabulary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The contract of ``cross_entropy``."""
        cut = cut or CutVocabulary(0, weight_VH.shape[0], lambda statistics: statistics)
        return _ChunkedCrossEntropy.apply(x_TH, weight_VH, labels_T, label_smoothing, cut, self)

    def slices(
        self, x_TH: torch.Tensor, weight_VH: torch.Tensor, kept: Sequence[torch.Tensor] = ()
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The logits slice by slice in x's dtype, with the first row of each; the first ones are ``kept``."""
        width = max(1, self.slice_logits // max(1, x_TH.shape[0]))
        factor_TH = self.factor(x_TH)
        start = 0
        for number, rows_SH in enumerate(weight_VH.split(width)):
            if number < len(kept):
                yield start, kept[number]
            else:
                yield start, F.linear(factor_TH, self.factor(rows_SH)).to(x_TH.dtype)
            start += rows_SH.shape[0]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_T: torch.Tensor,
        label_smoothing: float,
        cut: CutVocabulary,
        by: ChunkedCrossEntropy,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        statistics = Statistics.of_no_class(labels_T, torch.promote_types(x_TH.dtype, torch.float32))
        kept = []
        for start, logits_TS in by.slices(x_TH, weight_VH):
            if logits_TS.shape[0] * start + logits_TS.numel() <= KEPT_LOGITS:
                kept.append(logits_TS)
            by.arithmetic.add(statistics, logits_TS, labels_T, cut.first + start, label_smoothing > 0)
        s = cut.combine(statistics)
        log_sum_T = s.exp_sum_T.log_().add_(s.largest_T)
        uniform = label_smoothing / cut.classes
        loss_T = log_sum_T - (1 - label_smoothing) * s.target_T - uniform * s.logit_sum_T
        correct_T = s.predicted_T == labels_T
        ctx.save_for_backward(x_TH, weight_VH, labels_T, log_sum_T, *kept)
        ctx.smoothing, ctx.uniform, ctx.first, ctx.by = label_smoothing, uniform, cut.first, by
        ctx.mark_non_differentiable(correct_T)
        return loss_T.masked_fill_(labels_T == IGNORED, 0.0), correct_T

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        x_TH, weight_VH, labels_T, log_sum_T, *kept = ctx.saved_tensors
        grad_T = grad_T.masked_fill(labels_T == IGNORED, 0.0)
        targets = Targets(labels_T, log_sum_T, grad_T, ctx.smoothing, ctx.uniform)
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x_TH = torch.zeros_like(x_TH, dtype=log_sum_T.dtype) if wants_x else None
        grad_weight_VH = torch.empty_like(weight_VH) if wants_weight else None
        arithmetic, factor = ctx.by.arithmetic, ctx.by.factor
        factor_TH = factor(x_TH)
        for start, logits_TS in ctx.by.slices(x_TH, weight_VH, kept):
            grad_TS, grad_ST = map(factor, arithmetic.gradients(logits_TS, ctx.first + start, targets))
            rows = slice(start, start + len(grad_ST))
            if wants_x and grad_TS.dtype == grad_x_TH.dtype:
                grad_x_TH.addmm_(grad_TS, factor(weight_VH[rows]))
            elif wants_x:
                grad_x_TH += grad_TS @ weight_VH[rows]
            if wants_weight:
                grad_weight_VH[rows] = grad_ST @ factor_TH
        grad_x_TH = grad_x_TH.to(x_TH.dtype) if wants_x else None
        return grad_x_TH, grad_weight_VH, None, None, None, None


def _place(labels_T: torch.Tensor, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each label's column in the slice (clamped into it) and whether it lies there."""
    place_T = labels_T - start
    inside_T = (place_T >= 0) & (place_T < width)
    return place_T.clamp(0, width - 1), inside_T


CROSS_ENTROPY_CHUNKED = Implementation(
    "cross_entropy", "chunked", ChunkedCrossEntropy(), handles=(CUT_VOCABULARY,)
)
