"""The head's projection and the cross entropy per token, as one operation.

Taken together because the logits, T·V float32 numbers, are the largest tensor of a step: an
implementation may then compute them in pieces.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from portmoe.ops.operation import Operation, Sample, draw, rounding
from portmoe.ops.workload import Workload

IGNORED = -100  # the label of a token without a target


def cross_entropy(
    x_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """−log softmax(x weightᵀ)[label] per token.

    Args:
        x_TH: [T, H]. weight_VH: [V, H], x's dtype. The logits are rounded to that dtype, then float32.
        labels_T: [T] int64 in 0 … V − 1, or −100 for a token that has no target. Others are undefined.
        label_smoothing: a in 0 … 1: the target is 1 − a on the label plus a/V on every class.

    Returns:
        loss_T: float32, in nats; 0 where the label is −100. Not averaged. Differentiable.
        correct_T: bool, the label is the first class of highest logit; False where it is −100.
    """
    logits_TV = F.linear(x_TH, weight_VH)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    loss_T = F.cross_entropy(
        logits_TV, labels_T, reduction="none", ignore_index=IGNORED, label_smoothing=label_smoothing
    )
    return loss_T, logits_TV.argmax(dim=1) == labels_T


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    tokens, hidden, vocab = workload.tokens, workload.hidden, workload.vocab
    weight_VH = draw((vocab, hidden), workload, generator, scale=1 / math.sqrt(hidden))
    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    some_T = labels_T.where(torch.rand(tokens, generator=generator) < 0.5, IGNORED)
    cases = [("all labelled", labels_T, 0.0), ("some ignored", some_T, 0.0), ("smoothed", some_T, 0.1)]
    made = [
        Sample(label, (draw((tokens, hidden), workload, generator), weight_VH, t.to(workload.device), a))
        for label, t, a in cases
    ]
    # The exponential of these logits overflows float32; where they are rounded, so is their gradient.
    large_TH = draw((tokens, hidden), workload, generator, scale=200.0).detach()
    large = (large_TH, weight_VH.detach(), some_T.to(workload.device), 0.0)
    return [*made, Sample("large logits", large)]


# Logits and their gradient are rounded to the working dtype; the weight's gradient sums over tokens.
CROSS_ENTROPY = Operation("cross_entropy", cross_entropy, samples, rounding(8, sums=32))
