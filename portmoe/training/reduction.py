"""How much each micro-batch counts in the loss of a step."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from portmoe.config.sections.optimization import LossConfig
from portmoe.data.batch import Batch
from portmoe.ops.cross_entropy import IGNORED


def weights(loss: LossConfig, batches: Sequence[Batch], world: dist.ProcessGroup) -> list[float]:
    """What the mean over labelled tokens of each of this rank's micro-batches is multiplied by.

    1 each with ``loss.reduction: micro_batch``. With ``token`` its number of labels over the mean number in
    a micro-batch, so that the mean over all micro-batches weighs every labelled token alike. Collective.

    Args:
        batches: on the CPU.
        world: a CPU process group of all ranks. Those that share a micro-batch count it alike.
    """
    if loss.reduction == "micro_batch":
        return [1.0] * len(batches)
    labels = [int((batch.labels_T != IGNORED).sum()) for batch in batches]
    total = torch.tensor(sum(labels))
    dist.all_reduce(total, group=world)
    mean = total.item() / (len(batches) * world.size())
    return [number / mean if mean else 0.0 for number in labels]
