"""How many rows the experts' buffer has, as far as the config tells."""

import math

from portmoe.config import Config
from portmoe.ops.megablock_gating import megablock_capacity
from portmoe.ops.topk_gating import topk_capacity


def expert_capacity(config: Config, tokens: int) -> int:
    """C, the rows of each expert in training for a micro-batch of ``tokens``; 0 where the layer is dropless.

    Where the capacity follows the routing (``moe.drop_tokens`` off), it is that of a balanced routing.
    """
    model, moe = config.model, config.moe
    if model.moe_type == "MegaBlock-D":
        return 0
    if not moe.drop_tokens and (model.moe_type == "MegaBlock" or moe.top_k == 1):
        return math.ceil(tokens * moe.top_k / model.num_experts)
    if model.moe_type == "MegaBlock":
        return megablock_capacity(tokens, model.num_experts, moe.top_k, moe.capacity_factor)
    return topk_capacity(tokens, model.num_experts, moe.top_k, moe.capacity_factor, moe.min_capacity)


def expert_rows(config: Config, tokens: int) -> int:
    """Rows of the buffer all experts see together."""
    tensor = config.parallel.tensor
    if config.model.moe_type == "MegaBlock-D" or (tensor.mode == "isp" and tensor.size > 1):
        return config.moe.top_k * tokens  # ragged: one for each choice
    return config.model.num_experts * expert_capacity(config, tokens)
