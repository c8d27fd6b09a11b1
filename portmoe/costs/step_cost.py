"""What each part of one training step cannot do without: products, and bytes moved once.

A product with an [m,n] matrix is 2·m·n FLOPs per row forward and twice that backward. Bytes are those of
every argument, result and gradient read or written once; what stays in a cache between two passes is not
counted twice, nor what an implementation moves because it is made of several passes.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from portmoe.model.decoder import Decoder
from portmoe.model.share import FP32_BYTES, Share

ADAMW_PASSES = 8  # the norm reads the gradient; AdamW reads four tensors and writes three


@dataclass(frozen=True)
class Cost:
    """What one part costs, per step and rank."""

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The time below which no implementation that computes and then moves gets."""
        return self.flops / flops_per_second + self.bytes / bytes_per_second


def step_cost(
    decoders: Iterable[Decoder], share: Share, *, micro_batches: int, parameters: int
) -> dict[str, Cost]:
    """Part → its least cost in one step of one rank.

    Args:
        decoders: the rank's parts of the model.
        parameters: those the rank updates.
    """
    flops, moved = Counter(), Counter()
    for decoder in decoders:
        for cost in decoder.costs(share):
            flops[cost.part] += 3 * cost.forward_flops * micro_batches
            moved[cost.part] += cost.moved_bytes * micro_batches
    costs = {part: Cost(flops[part], moved[part]) for part in moved}
    return costs | {"optimizer": Cost(0, ADAMW_PASSES * FP32_BYTES * parameters)}
