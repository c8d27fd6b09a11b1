"""MegaBlocks' gating (Gale et al., 2022), with a capacity or dropless."""

from collections.abc import Sequence

import torch

from portmoe.ops.gating import assign_slots, balance_loss, choose_experts, chosen_scores, probabilities
from portmoe.ops.operation import Operation, Sample, rounding
from portmoe.ops.routing import Routing, check_choices, gating_logits
from portmoe.ops.workload import Workload


def megablock_gating(
    logits_SE: torch.Tensor,
    k: int,
    capacity_factor: float,
    *,
    drop_tokens: bool = True,
    dropless: bool = False,
) -> Routing:
    """Route S tokens to k of E experts each.

    g = softmax(logits) in float32; the choices are the k experts of highest g, the lower index on a
    tie. Slots count token-major: all choices of a token before those of the next.
    C = int(capacity_factor · k · S / E), without a minimum.
    The auxiliary loss is E/(S·k) · Σ_e count_e · mean_s g[s, e], before drops; 0 for S = 0.

    Args:
        logits_SE: [S, E], float32 or less precise (then computed in float32). S = 0 is allowed.
        k: choices per token, 1 … E.
        drop_tokens: False: C is the largest number of choices of an expert.
        dropless: nothing is dropped and C = S, which no expert can exceed; for the ragged buffer.

    Returns:
        Weights are g normalised over all k choices, then set to 0 where dropped.

    Raises:
        ValueError: k is not in 1 … E.
    """
    check_choices(logits_SE, k)
    tokens, experts = logits_SE.shape
    gate_SE = probabilities(logits_SE)
    expert_KS = choose_experts(gate_SE, k)
    slot_KS, count_E = assign_slots(expert_KS, experts, by_token=True)

    if dropless:
        capacity = tokens
    elif drop_tokens:
        capacity = megablock_capacity(tokens, experts, k, capacity_factor)
    else:
        capacity = int(count_E.max())

    chosen_KS = chosen_scores(gate_SE, expert_KS)
    weight_KS = chosen_KS / chosen_KS.sum(0) * (slot_KS < capacity)
    aux_loss = balance_loss(gate_SE, count_E, k)
    return Routing(expert_KS, slot_KS, weight_KS, capacity, aux_loss, count_E)


def megablock_capacity(tokens: int, experts: int, k: int, capacity_factor: float) -> int:
    """C = int(capacity_factor · k · S / E), in float64 and in this order."""
    return int(capacity_factor * k * tokens / experts)


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    def logits() -> torch.Tensor:
        return gating_logits(workload, generator)

    k = min(workload.top_k, workload.experts)  # expert parallelism may leave a rank fewer than k
    return [
        Sample("dropless", (logits(), k, 1.0), {"dropless": True}),
        Sample("capacity", (logits(), k, 1.0)),
        Sample("a capacity that is rounded down", (logits(), k, 0.7)),
        Sample("ties", (logits().detach().round().requires_grad_(), k, 1.0)),
        Sample("largest count", (logits(), k, 1.0), {"drop_tokens": False}),
    ]


# As for topk_gating: a softmax, one quotient, means over the tokens. Integers must agree exactly.
MEGABLOCK_GATING = Operation("megablock_gating", megablock_gating, samples, rounding(16, sums=16))
