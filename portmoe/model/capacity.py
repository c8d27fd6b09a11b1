"""How many rows the experts' buffer has, as far as the sizes tell."""

import math

from portmoe.families.architecture import Experts
from portmoe.ops.megablock_gating import megablock_capacity
from portmoe.ops.softmax_gating import softmax_capacity
from portmoe.ops.topk_gating import topk_capacity


def expert_capacity(experts: Experts, tokens: int) -> int:
    """C, the rows of each expert in training for a micro-batch of ``tokens``; 0 where the layer is dropless.

    Where the capacity follows the routing (``moe.drop_tokens`` off), it is that of a balanced routing.
    """
    gate = experts.gate
    if gate.dropless:
        return 0
    if not gate.drop_tokens and (gate.kind == "megablock" or gate.top_k == 1):
        return math.ceil(tokens * gate.top_k / experts.count)
    if gate.kind == "megablock":
        return megablock_capacity(tokens, experts.count, gate.top_k, gate.capacity_factor)
    if gate.kind == "softmax":
        return softmax_capacity(tokens, experts.count, gate.top_k, gate.capacity_factor, gate.min_capacity)
    return topk_capacity(tokens, experts.count, gate.top_k, gate.capacity_factor, gate.min_capacity)
