"""The embedding, the head and the loss with the vocabulary cut over the tensor-parallel ranks.

No rank ever has the logits of a class of another: the ranks exchange five numbers per token.
"""

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

from portmoe.model.decoder import Decoder
from portmoe.model.precision import computed
from portmoe.ops.chunked_cross_entropy import Targets, slice_gradients, slice_statistics
from portmoe.ops.cross_entropy import IGNORED
from portmoe.parallel.tensor import Region, cut


def share(model: Decoder, region: Region) -> None:
    """Cut the embedding and the head of ``model``, where they are here, by vocabulary."""
    if model.embedding is not None:
        cut(model.embedding, "weight", region.mesh, [Shard(0)])
        model.embedding.forward = partial(_embed, model.embedding, region)
    if model.head is not None:
        cut(model.head, "weight", region.mesh, [Shard(0)])
        model.ops = copy.copy(model.ops)
        model.ops.cross_entropy = partial(_cross_entropy, region)


def _embed(embedding: nn.Embedding, region: Region, tokens_T: torch.Tensor) -> torch.Tensor:
    weight_VH = computed(embedding.weight, embedding.weight.dtype)
    place_T = tokens_T - region.mesh.get_local_rank() * weight_VH.shape[0]
    inside_T = (place_T >= 0) & (place_T < weight_VH.shape[0])
    x_TH = F.embedding(place_T.where(inside_T, 0), weight_VH)
    return region.leave(x_TH * inside_T[:, None])


def _cross_entropy(
    region: Region,
    x_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ops.cross_entropy`` of this rank's rows of the head's weight; loss_T is the same on all ranks."""
    group, first = region.mesh.get_group(), region.mesh.get_local_rank() * weight_VH.shape[0]
    with region.entered(x_TH) as whole_TH:
        return _CutCrossEntropy.apply(whole_TH, weight_VH, labels_T, label_smoothing, group, first)


class _CutCrossEntropy(torch.autograd.Function):
    """``ops.chunked_cross_entropy`` with the statistics of all ranks' classes combined."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_T: torch.Tensor,
        label_smoothing: float,
        group: dist.ProcessGroup,
        first: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mine, kept = slice_statistics(x_TH, weight_VH, labels_T - first, label_smoothing)
        predicted_T = mine.predicted_T.to(mine.largest_T.dtype)
        numbers = torch.stack((mine.largest_T, predicted_T, mine.exp_sum_T, mine.logit_sum_T, mine.target_T))
        gathered = numbers.new_empty(group.size() * len(numbers), len(labels_T))
        dist.all_gather_into_tensor(gathered, numbers, group=group)
        numbers_P5T = gathered.unflatten(0, (group.size(), -1))
        largest_PT, predicted_PT, exp_sum_PT, logit_sum_PT, target_PT = numbers_P5T.unbind(1)
        largest_T, rank_T = largest_PT.max(dim=0)  # the first of equal ones, which has the lower classes
        classes = weight_VH.shape[0]
        predicted_T = predicted_PT.gather(0, rank_T[None])[0].long() + rank_T * classes
        log_sum_T = (exp_sum_PT * (largest_PT - largest_T).exp()).sum(0).log() + largest_T
        uniform = label_smoothing / (classes * group.size())
        loss_T = log_sum_T - (1 - label_smoothing) * target_PT.sum(0) - uniform * logit_sum_PT.sum(0)
        correct_T = predicted_T == labels_T
        ctx.save_for_backward(x_TH, weight_VH, labels_T, log_sum_T, *kept)
        ctx.label_smoothing, ctx.uniform, ctx.first = label_smoothing, uniform, first
        ctx.mark_non_differentiable(correct_T)
        return loss_T.masked_fill(labels_T == IGNORED, 0.0), correct_T

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        x_TH, weight_VH, labels_T, log_sum_T, *kept = ctx.saved_tensors
        grad_T = grad_T.masked_fill(labels_T == IGNORED, 0.0)
        targets = Targets(labels_T - ctx.first, log_sum_T, grad_T, ctx.label_smoothing, ctx.uniform)
        gradients = slice_gradients(x_TH, weight_VH, kept, targets, ctx.needs_input_grad[:2])
        return *gradients, None, None, None, None
