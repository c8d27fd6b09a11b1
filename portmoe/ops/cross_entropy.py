"""The head's projection and the cross entropy per token, as one operation.

Taken together because the logits, T·V float32 numbers, are the largest tensor of a step: an
implementation may then compute them in pieces, and ranks may each hold the logits of some classes only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F

from portmoe.ops.operation import Operation, Sample, draw, rounding
from portmoe.ops.workload import Workload

IGNORED = -100  # the label of a token without a target
CUT_VOCABULARY = "a vocabulary that is cut over ranks"
KEPT_LOGITS = 2**22  # that an implementation may keep for the backward pass, per call


@dataclass
class Statistics:
    """What the loss is made of, per token over the classes seen so far; float32 unless noted.

    Attributes:
        largest_T: the largest logit; −inf where there was no class.
        predicted_T: int64, the first class that has it, numbered among all classes there are.
        exp_sum_T: Σ exp(logit − largest).
        logit_sum_T: Σ logit; 0 without label smoothing.
        target_T: the label's logit; 0 where it is none of these classes.
    """

    largest_T: torch.Tensor
    predicted_T: torch.Tensor
    exp_sum_T: torch.Tensor
    logit_sum_T: torch.Tensor
    target_T: torch.Tensor

    @classmethod
    def of_no_class(cls, labels_T: torch.Tensor, dtype: torch.dtype) -> "Statistics":
        largest_T = torch.full(labels_T.shape, -torch.inf, dtype=dtype, device=labels_T.device)
        return cls(largest_T, torch.zeros_like(labels_T), *(torch.zeros_like(largest_T) for _ in range(3)))


def merged(parts_P: Statistics) -> Statistics:
    """The statistics of all classes, from those of P runs of them in ascending order: [P, T] → [T]."""
    largest_T, part_T = parts_P.largest_T.max(dim=0)  # the first of equal ones, which has the lower classes
    return Statistics(
        largest_T=largest_T,
        predicted_T=parts_P.predicted_T.gather(0, part_T[None])[0],
        exp_sum_T=(parts_P.exp_sum_T * (parts_P.largest_T - largest_T).exp()).sum(0),
        logit_sum_T=parts_P.logit_sum_T.sum(0),
        target_T=parts_P.target_T.sum(0),
    )


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
    """What an implementation in pieces does with the logits of the classes from ``start`` on."""

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
        """The loss's, by the logits: grad · (softmax − smoothed target), in their dtype; and transposed."""


@dataclass(frozen=True)
class CutVocabulary:
    """This rank's run of the classes, where several ranks share a vocabulary.

    Attributes:
        first: the number of the class that row 0 of this rank's weight belongs to.
        classes: V, of all ranks together.
        combine: the statistics over all ranks' classes, from those over this rank's; every rank calls it.
    """

    first: int
    classes: int
    combine: Callable[[Statistics], Statistics]


def cross_entropy(
    x_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    label_smoothing: float,
    cut: CutVocabulary | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """−log softmax(x weightᵀ)[label] per token.

    Args:
        x_TH: [T, H]. weight_VH: [V, H], x's dtype. The logits are rounded to that dtype, then float32.
        labels_T: [T] int64 in 0 … V − 1, or −100 for a token that has no target. Others are undefined.
        label_smoothing: a in 0 … 1: the target is 1 − a on the label plus a/V on every class.
        cut: the weight has the rows of these classes only, and labels and V count those of all ranks. The
            results are then those of the whole vocabulary, and the gradient of x that of this rank's classes.
            An implementation that takes it names CUT_VOCABULARY in ``handles``.

    Returns:
        loss_T: float32, in nats; 0 where the label is −100. Not averaged. Differentiable.
        correct_T: bool, the label is the first class of highest logit; False where it is −100.
    """
    logits_TV = F.linear(x_TH, weight_VH)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if cut is not None:
        return _of_part(logits_TV, labels_T, label_smoothing, cut)
    loss_T = F.cross_entropy(
        logits_TV, labels_T, reduction="none", ignore_index=IGNORED, label_smoothing=label_smoothing
    )
    return loss_T, logits_TV.argmax(dim=1) == labels_T


def _of_part(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, label_smoothing: float, cut: CutVocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    place_T = labels_T - cut.first
    inside_T = (place_T >= 0) & (place_T < logits_TV.shape[1])
    target_T = logits_TV.gather(1, place_T.where(inside_T, 0)[:, None])[:, 0] * inside_T
    log_sum_T, logit_sum_T = logits_TV.logsumexp(dim=1), logits_TV.sum(dim=1)
    with torch.no_grad():
        largest_T, predicted_T = logits_TV.max(dim=1)
        exp_sum_T = (log_sum_T - largest_T).exp()
        sums = (logit_sum_T.detach(), target_T.detach())
        of_all = cut.combine(Statistics(largest_T, predicted_T + cut.first, exp_sum_T, *sums))
        log_sum_of_all_T = of_all.exp_sum_T.log() + of_all.largest_T
        share_T = (log_sum_T - log_sum_of_all_T).exp()  # of this rank's classes in the softmax
    loss_T = (
        _with_gradient_of(log_sum_T * share_T, log_sum_of_all_T)
        - (1 - label_smoothing) * _with_gradient_of(target_T, of_all.target_T)
        - label_smoothing / cut.classes * _with_gradient_of(logit_sum_T, of_all.logit_sum_T)
    )
    return loss_T.masked_fill(labels_T == IGNORED, 0.0), of_all.predicted_T == labels_T


def _with_gradient_of(mine_T: torch.Tensor, value_T: torch.Tensor) -> torch.Tensor:
    return value_T + (mine_T - mine_T.detach())


def needs(workload: Workload) -> tuple[str, ...]:
    return (CUT_VOCABULARY,) if workload.vocab_parts > 1 else ()


def kept_bytes(tokens: int, classes: int, dtype: torch.dtype) -> int:
    """What a lean implementation keeps of ``classes`` logits a token for the backward pass."""
    return min(tokens * classes, KEPT_LOGITS) * dtype.itemsize


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    tokens, hidden, vocab = workload.tokens, workload.hidden, workload.vocab
    weight_VH = draw((vocab, hidden), workload, generator, scale=1 / math.sqrt(hidden))
    labels_T = torch.randint(vocab * workload.vocab_parts, (tokens,), generator=generator)
    some_T = labels_T.where(torch.rand(tokens, generator=generator) < 0.5, IGNORED)
    cases = [("all labelled", labels_T, 0.0), ("some ignored", some_T, 0.0), ("smoothed", some_T, 0.1)]
    made = [
        Sample(label, (draw((tokens, hidden), workload, generator), weight_VH, t.to(workload.device), a))
        for label, t, a in cases
    ]
    # The exponential of these logits overflows float32; where they are rounded, so is their gradient.
    large_TH = draw((tokens, hidden), workload, generator, scale=200.0).detach()
    large = (large_TH, weight_VH.detach(), some_T.to(workload.device), 0.0)
    made.append(Sample("large logits", large))
    if workload.vocab_parts == 1:
        return made
    return [replace(sample, kwargs={"cut": _cut_of(sample, workload, generator)}) for sample in made]


def _cut_of(sample: Sample, workload: Workload, generator: torch.Generator) -> CutVocabulary:
    """The second of ``vocab_parts`` ranks, beside made-up logits of the others of the sample's own size."""
    x_TH, _, labels_T, _ = sample.args
    vocab, parts = workload.vocab, workload.vocab_parts
    size = x_TH.detach().float().square().mean().sqrt().cpu()
    logits_TPV = torch.randn(len(labels_T), parts, vocab, generator=generator).mul_(size)
    labels_T1 = labels_T.cpu()[:, None]

    def statistics(part: int) -> Statistics:
        logits_TV, place_T1 = logits_TPV[:, part], labels_T1 - part * vocab
        largest_T, predicted_T = logits_TV.max(dim=1)
        inside_T = ((place_T1 >= 0) & (place_T1 < vocab))[:, 0]
        return Statistics(
            largest_T,
            predicted_T + part * vocab,
            (logits_TV - largest_T[:, None]).exp().sum(1),
            logits_TV.sum(1),
            logits_TV.gather(1, place_T1.clamp(0, vocab - 1))[:, 0] * inside_T,
        )

    others = [statistics(part) for part in range(parts)]

    def combine(mine: Statistics) -> Statistics:
        all_of_them = [others[0], mine, *others[2:]]
        return merged(
            Statistics(
                *(
                    torch.stack([getattr(s, name).to(value) for s in all_of_them])
                    for name, value in vars(mine).items()
                )
            )
        )

    return CutVocabulary(vocab, vocab * parts, combine)


# Logits and their gradient are rounded to the working dtype; the weight's gradient sums over tokens.
CROSS_ENTROPY = Operation("cross_entropy", cross_entropy, samples, rounding(8, sums=32), needs)
