"""How much each micro-batch counts in the objective of a step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from portmoe.config.sections.optimization import LossConfig
from portmoe.data.batch import Batch
from portmoe.ops.cross_entropy import IGNORED


class Weights(NamedTuple):
    """What the parts of one micro-batch's objective are multiplied by."""

    loss: float = 1.0  # its mean over labelled tokens
    balance: float = 1.0  # its auxiliary loss
    z: float = 1.0  # its z-loss


def weights(
    loss: LossConfig, balance: str, batches: Sequence[Batch], world: dist.ProcessGroup
) -> list[Weights]:
    """What each of this rank's micro-batches counts, so that the mean over all is one over the global batch.

    1 each with ``loss.reduction: micro_batch``. With ``token`` the number of what a part is a mean over, over
    the mean number in a micro-batch: labels for the loss; for the auxiliary loss samples where it is one of
    samples, else tokens without padding, as for the z-loss. Collective.

    Args:
        balance: what the auxiliary loss is a mean over, see ``families.architecture.Balance``.
        batches: on the CPU.
        world: a CPU process group of all ranks. Those that share a micro-batch count it alike.
    """
    if loss.reduction == "micro_batch":
        return [Weights()] * len(batches)
    counts = []
    for batch in batches:
        labels, tokens = int((batch.labels_T != IGNORED).sum()), batch.segments.real
        counts.append((labels, batch.num_segments if balance == "sequence" else tokens, tokens))
    total = torch.tensor(counts).sum(0)
    dist.all_reduce(total, group=world)
    means = (total / (len(batches) * world.size())).tolist()
    return [
        Weights(*(number / mean if mean else 0.0 for number, mean in zip(numbers, means, strict=True)))
        for numbers in counts
    ]
