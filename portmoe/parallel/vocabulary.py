"""The embedding, the head and the loss with the vocabulary cut over the tensor-parallel ranks.

No rank ever has the logits of a class of another: the ranks exchange five numbers per token.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

from portmoe.model.decoder import Decoder
from portmoe.model.precision import computed
from portmoe.ops.cross_entropy import CutVocabulary, Statistics, merged
from portmoe.parallel.tensor import Region, cut


def share(model: Decoder, region: Region) -> None:
    """Cut the embedding and the head of ``model``, where they are here, by vocabulary."""
    if model.embedding is not None:
        cut(model.embedding, "weight", region.mesh, [Shard(0)])
        model.embedding.forward = partial(_embed, model.embedding, region)
    if model.head is not None:
        cut(model.head, "weight", region.mesh, [Shard(0)])
        model.ops = copy.copy(model.ops)
        model.ops.cross_entropy = partial(_cross_entropy, region, model.ops.cross_entropy)


def _embed(embedding: nn.Embedding, region: Region, tokens_T: torch.Tensor) -> torch.Tensor:
    weight_VH = computed(embedding.weight, embedding.weight.dtype)
    place_T = tokens_T - region.mesh.get_local_rank() * weight_VH.shape[0]
    inside_T = (place_T >= 0) & (place_T < weight_VH.shape[0])
    x_TH = F.embedding(place_T.where(inside_T, 0), weight_VH)
    return region.leave(x_TH * inside_T[:, None])


def _cross_entropy(
    region: Region,
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    x_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ops.cross_entropy`` of this rank's rows of the head's weight; loss_T is the same on all ranks."""
    classes, group = weight_VH.shape[0], region.mesh.get_group()
    first = region.mesh.get_local_rank() * classes
    cut = CutVocabulary(first, classes * group.size(), partial(_exchanged, group, classes, first))
    with region.entered(x_TH) as whole_TH:
        return compute(whole_TH, weight_VH, labels_T, label_smoothing, cut)


def _exchanged(group: dist.ProcessGroup, classes: int, first: int, mine: Statistics) -> Statistics:
    """Statistics over the classes of all ranks, which exchange five numbers per token."""
    predicted_T = (mine.predicted_T - first).to(mine.largest_T.dtype)
    numbers = torch.stack((mine.largest_T, predicted_T, mine.exp_sum_T, mine.logit_sum_T, mine.target_T))
    gathered = numbers.new_empty(group.size() * len(numbers), numbers.shape[1])
    dist.all_gather_into_tensor(gathered, numbers, group=group)
    parts_P = Statistics(*gathered.unflatten(0, (group.size(), -1)).unbind(1))
    first_P1 = torch.arange(group.size(), device=numbers.device)[:, None] * classes
    parts_P.predicted_T = parts_P.predicted_T.long() + first_P1
    return merged(parts_P)
