"""The figures of the whole validation set, the same on every layout."""

import torch.distributed as dist

from portmoe.data import DataStream
from portmoe.parallel.layout import Layout
from portmoe.record.log_line import perplexity
from portmoe.training.engine import Engine


def validate(
    engine: Engine, valid: DataStream, layout: Layout, world: dist.ProcessGroup, by_token: bool
) -> dict[str, float]:
    """Measure every pack of ``valid`` once. Collective.

    ``valid_loss`` weighs alike what the training loss does, every pack's mean or every labelled token; the
    next two weigh every labelled token alike, and ``valid_tokens`` counts them. Without a label anywhere, the
    losses are nan.

    Args:
        by_token: ``valid_loss`` is the mean over labelled tokens.
        world: a CPU process group of all ranks.
    """
    loss = loss_sum = 0.0
    correct = labels = 0
    for batches in valid.passes():
        totals = engine.evaluate(batches).reduce(0, world, layout)
        # Packs that only fill a pass up have no labels and so a mean of 0; they are not counted below.
        if sum(totals.tokens):
            loss += totals.loss * len(batches) * layout.data
        loss_sum += sum(totals.loss_sums)
        correct += sum(totals.correct)
        labels += sum(totals.tokens)
    of_tokens = loss_sum / labels if labels else float("nan")
    of_packs = loss / valid.num_packs if labels else float("nan")
    return {
        "valid_loss": of_tokens if by_token else of_packs,
        "valid_acc": correct / max(labels, 1),
        "valid_perplexity": perplexity(of_tokens),
        "valid_tokens": labels,
    }
