"""The loss by torch_npu's functions for a cut vocabulary (from 2.13 on), for one rank as for several.

The forward function gives what the contract's statistics are made of but for the class of the highest logit,
which its logits tell; they are dropped before the backward pass, whose function computes them again from the
largest logit and the sum. The vendor's third function, the loss from those, is the contract's own.

Whether ``vocab_end_index`` is the last class or the one after it is not said: labels are renumbered from this
rank's first class, and those of other ranks past both.
"""

from typing import Any

import torch

from portmoe.backends.torch.cross_entropy import CROSS_ENTROPY_CHUNKED
from portmoe.ops.cross_entropy import IGNORED, CutVocabulary, Statistics


def cross_entropy(
    x_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    label_smoothing: float,
    cut: CutVocabulary | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without label smoothing and with tokens; otherwise the chunked one computes it."""
    if label_smoothing or not len(x_TH):
        return CROSS_ENTROPY_CHUNKED.function(x_TH, weight_VH, labels_T, label_smoothing, cut)
    cut = cut or CutVocabulary(0, len(weight_VH), lambda statistics: statistics)
    return _FusedCrossEntropy.apply(x_TH, weight_VH, labels_T, cut)


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, cut: CutVocabulary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch_npu

        classes = len(weight_VH)
        place_T = labels_T - cut.first
        place_T = place_T.where((place_T >= 0) & (place_T < classes), classes + 1)
        largest_T, exp_sum_T, target_T, elsewhere, local_T, logits_TV = (
            torch_npu.npu_fused_linear_online_max_sum(
                x_TH, weight_VH, place_T, 0, classes, return_logits=True
            )
        )
        predicted_T = logits_TV.argmax(dim=1) + cut.first
        nothing_T = torch.zeros_like(largest_T)  # the sum of the logits, for label smoothing
        s = cut.combine(Statistics(largest_T, predicted_T, exp_sum_T, nothing_T, target_T))
        ctx.save_for_backward(x_TH, weight_VH, labels_T, elsewhere, local_T, s.largest_T, s.exp_sum_T)
        correct_T = s.predicted_T == labels_T
        ctx.mark_non_differentiable(correct_T)
        loss_T = s.exp_sum_T.log() + s.largest_T - s.target_T
        return loss_T.masked_fill_(labels_T == IGNORED, 0.0), correct_T

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        import torch_npu

        x_TH, weight_VH, labels_T, elsewhere, local_T, largest_T, exp_sum_T = ctx.saved_tensors
        grad_x_TH, grad_weight_VH = torch_npu.npu_fused_linear_cross_entropy_loss_with_max_sum_backward(
            grad_T.masked_fill(labels_T == IGNORED, 0.0),
            x_TH,
            weight_VH,
            elsewhere,
            local_T,
            logits_max=largest_T,
            sum_exp_logits=exp_sum_T,
        )
        return grad_x_TH, grad_weight_VH, None, None
