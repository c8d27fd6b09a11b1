"""The two ends of the decoder that know the vocabulary: the embedding, and the head with the loss."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from portmoe.model.precision import computed
from portmoe.model.share import FP32_BYTES, Call, Calls, Costs, PartCost, Share
from portmoe.model.sharing import ALL_TOKENS, ALONE, Cut
from portmoe.ops import OpTable
from portmoe.ops.cross_entropy import CutVocabulary, kept_bytes


class Embedding(nn.Embedding):
    """int64 [T] → float32 [T,H]. The values are left uninitialised; ``model.init`` draws them."""

    part = "embedding"  # of a step, as profiles name it
    cuts: ClassVar[dict[str, Cut]] = {"weight": Cut(0)}

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__(vocabulary, hidden)
        self.region, self.tokens = ALONE, ALL_TOKENS

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        tokens_T = self.tokens.own(tokens_T)
        if self.region.parts == 1:
            return super().forward(tokens_T)
        weight_VH = computed(self.weight, self.weight.dtype)
        place_T = tokens_T - self.region.rank * weight_VH.shape[0]
        inside_T = (place_T >= 0) & (place_T < weight_VH.shape[0])
        x_TH = F.embedding(place_T.where(inside_T, 0), weight_VH)
        return self.region.leave(x_TH * inside_T[:, None])

    def reset_parameters(self) -> None:
        """Draw nothing: torch calls this on construction, and ``model.init`` sets every value anyway."""


class Head(nn.Module):
    """Hidden states and labels → the loss of every token, by the operation ``cross_entropy``.

    Attributes:
        cut: which classes are here, where ranks share the vocabulary.
        all_classes: makes the logits of all classes, in the last dimension, of those that are here.
    """

    cuts: ClassVar[dict[str, Cut]] = {"weight": Cut(0)}

    def __init__(self, vocabulary: int, hidden: int, ops: OpTable) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))
        self.ops = ops
        self.region, self.tokens = ALONE, ALL_TOKENS
        self.cut: CutVocabulary | None = None
        self.all_classes: Callable[[torch.Tensor], torch.Tensor] = _same

    def forward(
        self, x_TH: torch.Tensor, labels_T: torch.Tensor, label_smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss_T, correct_T) of the whole micro-batch, as ``cross_entropy`` gives them."""
        weight_VH = computed(self.weight, x_TH.dtype)
        if self.cut is not None:
            with self.region.entered(x_TH) as x_TH:
                return self.ops.cross_entropy(x_TH, weight_VH, labels_T, label_smoothing, self.cut)
        own_T = self.tokens.own(labels_T)
        loss_T, correct_T = self.ops.cross_entropy(x_TH, weight_VH, own_T, label_smoothing)
        if not self.tokens.split:
            return loss_T, correct_T
        both_T2 = self.tokens.gather(torch.stack((loss_T, correct_T.float()), dim=1))
        return both_T2[:, 0].contiguous(), both_T2[:, 1].detach() > 0

    def logits(self, x_TH: torch.Tensor, places_B: torch.Tensor) -> torch.Tensor:
        """float32 [B,V]: the logits of what follows these tokens of the micro-batch, the same on every rank.

        The products are in the hidden states' dtype. For generation: without a gradient.
        """
        weight_VH = computed(self.weight, x_TH.dtype)
        with self.region.entered(x_TH) as x_TH:
            x_BH = self.tokens.gather(x_TH)[places_B]
        return self.all_classes(F.linear(x_BH, weight_VH).float())

    def calls(self, share: Share) -> Calls:
        vocabulary, hidden = self.weight.shape
        work = share.workload(
            share.inside, hidden=hidden, vocab=vocabulary // share.parts, vocab_parts=share.parts
        )
        yield Call("cross_entropy", "", work)

    def costs(self, share: Share) -> Costs:
        weights = self.weight.numel() // share.parts
        moved = 3 * weights + 2 * share.inside * self.weight.shape[1]
        yield PartCost("loss", 2 * share.inside * weights, moved * share.item)

    def kept_bytes(self, share: Share) -> int:
        """Bytes of the input, the log-sum-exp, and the first logits."""
        vocabulary, hidden = self.weight.shape
        kept = share.entering * hidden * share.item + share.inside * FP32_BYTES
        return kept + kept_bytes(share.inside, vocabulary // share.parts, share.dtype)


def _same(logits_BV: torch.Tensor) -> torch.Tensor:
    return logits_BV
