"""What weighs alike in the loss of a step."""

import pytest
import torch
import torch.distributed as dist

from portmoe.config.sections.optimization import LossConfig
from portmoe.data.batch import Batch
from portmoe.ops import Segments
from portmoe.training.reduction import weights


def batch(labels, tokens=8, padding=0):
    """So many tokens have a label; a sample of one token, one of the others, and padding."""
    labels_T = torch.full((tokens,), -100)
    labels_T[:labels] = 1
    real = tokens - padding
    offsets = sorted({0, min(1, real), real, tokens})
    return Batch(labels_T, labels_T, labels_T, labels_T, Segments(tuple(offsets), padded=padding > 0), 0)


def of_rank(batches, balance):
    """This rank's weights of both kinds; ``batches``: rank → (labels, padding) of its micro-batches."""
    mine = [batch(labels, padding=padding) for labels, padding in batches[dist.get_rank()]]
    kinds = ("token", "micro_batch")
    return [weights(LossConfig(reduction=kind), balance, mine, dist.group.WORLD) for kind in kinds]


def joined(batches, balance="layer"):
    dist.init_process_group("gloo")
    try:
        return of_rank(batches, balance)
    finally:
        dist.destroy_process_group()


def test_every_token_of_the_step_weighs_alike_over_ranks(world):
    batches = [[(8, 0), (2, 0)], [(0, 0), (6, 0)]]
    for mine, (by_token, by_batch) in zip(batches, world(2).call(joined, batches), strict=True):
        assert by_batch == [(1.0, 1.0, 1.0)] * 2
        # the mean over 4 micro-batches of weight · (sum / labels) is the sum over all 16 tokens / 16
        assert [w.loss / 4 / n for w, (n, _) in zip(by_token, mine, strict=True) if n] == pytest.approx(
            [1 / 16] * sum(n > 0 for n, _ in mine)
        )
        assert [(w.balance, w.z) for w in by_token] == [(1.0, 1.0)] * 2  # of as many tokens each
    nothing = world(2).call(joined, [[(0, 8), (0, 8)]] * 2)[0][0]
    assert nothing == [(0.0, 0.0, 0.0)] * 2


def test_auxiliary_losses_weigh_samples_or_tokens_alike(world):
    """Micro-batches of 8, 5, 1 and 0 tokens that are no padding, of 2, 2, 1 and 0 samples."""
    batches = [[(8, 0), (2, 3)], [(1, 7), (0, 8)]]
    of_tokens = [w for by_token, _ in world(2).call(joined, batches, "model") for w in by_token]
    assert [w.balance for w in of_tokens] == [w.z for w in of_tokens]
    assert [w.z for w in of_tokens] == pytest.approx([4 * n / 14 for n in (8, 5, 1, 0)])
    of_samples = [w for by_token, _ in world(2).call(joined, batches, "sequence") for w in by_token]
    assert [w.balance for w in of_samples] == pytest.approx([4 * n / 5 for n in (2, 2, 1, 0)])
    assert [w.z for w in of_samples] == pytest.approx([4 * n / 14 for n in (8, 5, 1, 0)])
