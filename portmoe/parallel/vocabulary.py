"""The loss with the vocabulary cut over the tensor-parallel ranks.

In training no rank has the logits of a class of another: the ranks exchange five numbers per token.
"""

from functools import partial

import torch
import torch.distributed as dist

from portmoe.model.decoder import Decoder
from portmoe.ops.cross_entropy import CutVocabulary, Statistics, merged
from portmoe.parallel.tensor import Region


def share(model: Decoder, region: Region) -> None:
    """Let the ranks of ``region`` join what each makes of its classes; the head, if here, is whole yet."""
    if model.head is not None:
        vocabulary, group = model.head.weight.shape[0], region.mesh.get_group()
        classes = vocabulary // region.parts
        first = region.rank * classes
        model.head.cut = CutVocabulary(first, vocabulary, partial(_exchanged, group, classes, first))
        model.head.all_classes = partial(_gathered, group)


def _gathered(group: dist.ProcessGroup, mine_BV: torch.Tensor) -> torch.Tensor:
    """The logits of all classes, for generation: of few tokens, and without a gradient."""
    parts = [torch.empty_like(mine_BV) for _ in range(group.size())]
    dist.all_gather(parts, mine_BV.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


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
