"""The figures of the whole validation set, the same on every layout."""

import torch.distributed as dist

from portmoe.data import DataStream
from portmoe.parallel.layout import Layout
from portmoe.record.log_line import perplexity
from portmoe.training.engine import Engine


def validate(engine: Engine, valid: DataStream, layout: Layout, world: dist.ProcessGroup) -> dict[str, float]:
    """Measure every pack of ``valid`` once. Collective.

    ``valid_loss`` is the mean over packs of each one's mean, as the training loss is over micro-batches; the
    next two weigh every labelled token alike, and ``valid_tokens`` counts them. Without a label anywhere, the
    losses are nan.

    Args:
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
    return {
        "valid_loss": loss / valid.num_packs if labels else float("nan"),
        "valid_acc": correct / max(labels, 1),
        "valid_perplexity": perplexity(loss_sum / labels if labels else float("nan")),
        "valid_tokens": labels,
    }
