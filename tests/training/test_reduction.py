"""What weighs alike in the loss of a step."""

import pytest
import torch
import torch.distributed as dist

from portmoe.config.sections.optimization import LossConfig
from portmoe.data.batch import Batch
from portmoe.ops import Segments
from portmoe.training.reduction import weights


def batch(labels, tokens=8):
    labels_T = torch.full((tokens,), -100)
    labels_T[:labels] = 1
    return Batch(labels_T, labels_T, labels_T, labels_T, Segments((0, tokens)), 0)


def of_rank(labels):
    """Each rank's weights; ``labels``: rank → the number of labels in its micro-batches."""
    mine = [batch(number) for number in labels[dist.get_rank()]]
    return [weights(LossConfig(reduction=kind), mine, dist.group.WORLD) for kind in ("token", "micro_batch")]


def joined(labels):
    dist.init_process_group("gloo")
    try:
        return of_rank(labels)
    finally:
        dist.destroy_process_group()


def test_every_token_of_the_step_weighs_alike_over_ranks(world):
    labels = [[8, 2], [0, 6]]
    for rank, (by_token, by_batch) in enumerate(world(2).call(joined, labels)):
        assert by_batch == [1.0, 1.0]
        # the mean over 4 micro-batches of weight · (sum / labels) is the sum over all 16 tokens / 16
        assert [w / 4 / n for w, n in zip(by_token, labels[rank], strict=True) if n] == pytest.approx(
            [1 / 16] * sum(n > 0 for n in labels[rank])
        )
    assert world(2).call(joined, [[0, 0], [0, 0]])[0][0] == [0.0, 0.0]
