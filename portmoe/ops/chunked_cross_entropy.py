"""Cross entropy that never holds more than a slice of the vocabulary's logits.

The vocabulary is walked in slices, keeping a running maximum and sum of exponentials per token
(Milakov and Gimelshein, 2018). The backward pass computes the logits of each slice again, but for the
first few slices, which are kept: a small vocabulary costs no product more than the plain loss. Every
row of the weight's gradient is complete after its slice, so nothing is accumulated in reduced
precision and no float32 copy of that gradient exists.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from portmoe.ops.cross_entropy import IGNORED
from portmoe.ops.products import slow_in

# Of one slice's logits. On the CPU 4 MiB in float32, which stay in the cache; an accelerator wants wide
# products.
SLICE_ELEMENTS = 2**20
ACCELERATOR_SLICE_ELEMENTS = 2**24
KEPT_ELEMENTS = 2**22  # of the slices that are kept for the backward pass


def chunked_cross_entropy(
    x_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of ``cross_entropy``, in memory of order T·H + some slices besides the gradients."""
    return _ChunkedCrossEntropy.apply(x_TH, weight_VH, labels_T, label_smoothing)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, label_smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        statistics, kept = slice_statistics(x_TH, weight_VH, labels_T, label_smoothing)
        largest_T, predicted_T, exp_sum_T, logit_sum_T, target_T = statistics
        log_sum_T = exp_sum_T.log_().add_(largest_T)
        uniform = label_smoothing / weight_VH.shape[0]
        loss_T = log_sum_T - (1 - label_smoothing) * target_T - uniform * logit_sum_T
        correct_T = predicted_T == labels_T
        ctx.save_for_backward(x_TH, weight_VH, labels_T, log_sum_T, *kept)
        ctx.label_smoothing = label_smoothing
        ctx.mark_non_differentiable(correct_T)
        return loss_T.masked_fill_(labels_T == IGNORED, 0.0), correct_T

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        x_TH, weight_VH, labels_T, log_sum_T, *kept = ctx.saved_tensors
        grad_T = grad_T.masked_fill(labels_T == IGNORED, 0.0)
        uniform = ctx.label_smoothing / weight_VH.shape[0]
        gradients = slice_gradients(
            x_TH,
            weight_VH,
            labels_T,
            kept,
            log_sum_T,
            grad_T,
            ctx.label_smoothing,
            uniform,
            ctx.needs_input_grad[:2],
        )
        return *gradients, None, None


def slice_statistics(
    x_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, label_smoothing: float
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """Per token over the classes of ``weight_VH``: what the loss is made of.

    Returns:
        (largest_T, the largest logit; predicted_T (int64), its first class; exp_sum_T, Σ exp(logit −
        largest); logit_sum_T, Σ logit (0 without smoothing); target_T, the label's logit, 0 where it is no
        class here), and the first slices' logits for ``slice_gradients``.
    """
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    largest_T = torch.full(labels_T.shape, -torch.inf, dtype=wide, device=x_TH.device)
    predicted_T = torch.zeros_like(labels_T)
    exp_sum_T, logit_sum_T, target_T = (torch.zeros_like(largest_T) for _ in range(3))
    kept = []
    for start, slice_TS in _slices(x_TH, weight_VH):
        if slice_TS.shape[0] * start + slice_TS.numel() <= KEPT_ELEMENTS:
            kept.append(slice_TS)
        logits_TS = slice_TS.to(wide)
        slice_largest_T, slice_predicted_T = logits_TS.max(dim=1)
        predicted_T = torch.where(slice_largest_T > largest_T, slice_predicted_T + start, predicted_T)
        new_T = torch.maximum(largest_T, slice_largest_T)
        place_T, inside_T = _place(labels_T, start, logits_TS.shape[1])
        target_T = torch.where(inside_T, logits_TS.gather(1, place_T[:, None])[:, 0], target_T)
        if label_smoothing:
            logit_sum_T += logits_TS.sum(dim=1)
        exp_sum_T.mul_((largest_T - new_T).exp_()).add_(logits_TS.sub(new_T[:, None]).exp_().sum(dim=1))
        largest_T = new_T
    return (largest_T, predicted_T, exp_sum_T, logit_sum_T, target_T), kept


def slice_gradients(
    x_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    kept: Sequence[torch.Tensor],
    log_sum_T: torch.Tensor,
    grad_T: torch.Tensor,
    label_smoothing: float,
    uniform: float,
    wanted: tuple[bool, ...],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x and of ``weight_VH`` from the classes it has, where ``wanted``.

    Args:
        kept: the first slices' logits; the others are computed again.
        log_sum_T: log Σ exp(logit) over all classes there are.
        grad_T: of the loss, 0 where the label is ignored.
        uniform: the smoothed target of every class.
    """
    wants_x, wants_weight = wanted
    grad_x_TH = torch.zeros_like(x_TH, dtype=log_sum_T.dtype) if wants_x else None
    grad_weight_VH = torch.empty_like(weight_VH) if wants_weight else None
    factor_TH = _factor(x_TH)
    for start, logits_TS in _slices(x_TH, weight_VH, kept):
        # d loss / d logit = softmax − smoothed target
        grad_TS = logits_TS.sub(log_sum_T[:, None]).exp_()
        if uniform:
            grad_TS.sub_(uniform)
        grad_TS.mul_(grad_T[:, None])
        place_T, inside_T = _place(labels_T, start, grad_TS.shape[1])
        target_T = torch.where(inside_T, (label_smoothing - 1) * grad_T, 0.0)
        grad_TS = _factor(grad_TS.scatter_add_(1, place_T[:, None], target_T[:, None]).to(x_TH.dtype))
        rows = slice(start, start + grad_TS.shape[1])
        if wants_x:
            grad_x_TH += grad_TS @ _factor(weight_VH[rows])
        if wants_weight:
            grad_weight_VH[rows] = grad_TS.t() @ factor_TH
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
