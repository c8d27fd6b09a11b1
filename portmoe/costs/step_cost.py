"""What each part of one training step cannot do without: products, and bytes moved once.

A product with an [m,n] matrix is 2·m·n FLOPs per row forward and twice that backward. Bytes are those of
every argument, result and gradient read or written once; what stays in a cache between two passes is not
counted twice, nor what an implementation moves because it is made of several passes.
"""

from dataclasses import dataclass

from portmoe.costs.memory import FP32_BYTES
from portmoe.ops import Workload

ADAMW_PASSES = 8  # the norm reads the gradient; AdamW reads four tensors and writes three


@dataclass(frozen=True)
class Cost:
    """Of one part, per step and rank."""

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The time below which no implementation that computes and then moves gets."""
        return self.flops / flops_per_second + self.bytes / bytes_per_second


def step_cost(
    work: Workload, *, moe_layers: int, dense_layers: int, head: bool, micro_batches: int, parameters: int
) -> dict[str, Cost]:
    """Part → its least cost in one step of one rank.

    Args:
        moe_layers: on this rank; so ``dense_layers``, ``head`` and ``parameters`` (those it updates).
    """
    tokens, hidden, item = work.tokens, work.hidden, work.dtype.itemsize
    rows, heads = tokens * work.top_k, work.heads * work.head_dim
    layers, activation = moe_layers + dense_layers, tokens * hidden * item
    moved = 2 * (tokens + rows) * hidden * item  # a row read and written in either direction
    expert_weights = 3 * work.experts * work.ffn_width * hidden * item
    per_micro_batch = {
        "router": (moe_layers * 6 * tokens * hidden * work.experts, moe_layers * 3 * activation),
        "dispatch": (0, moe_layers * moved),
        "experts": (
            moe_layers * 18 * rows * hidden * work.ffn_width,
            # weights twice and their gradient; rows, their result and both gradients
            moe_layers * (3 * expert_weights + 4 * rows * hidden * item),
        ),
        "combine": (0, moe_layers * (moved + rows * hidden * item)),  # its weights' gradient reads rows again
        "attention": (
            # four projections, and scores and sums over the half that causality leaves
            layers * 3 * (8 * tokens * hidden * heads + 2 * tokens * work.seq_len * heads),
            layers * 3 * (4 * hidden * heads * item + 2 * activation + 4 * tokens * heads * item),
        ),
        "dense network": (
            dense_layers * 18 * tokens * hidden * work.ffn_width,
            dense_layers * (9 * hidden * work.ffn_width * item + 4 * activation),
        ),
        "norms": (0, (2 * layers + head) * 5 * activation),
        "loss": (
            head * 6 * tokens * hidden * work.vocab,
            head * (3 * work.vocab * hidden * item + 2 * activation),
        ),
    }
    costs = {
        part: Cost(flops * micro_batches, moved * micro_batches)
        for part, (flops, moved) in per_micro_batch.items()
    }
    return costs | {"optimizer": Cost(0, ADAMW_PASSES * FP32_BYTES * parameters)}
