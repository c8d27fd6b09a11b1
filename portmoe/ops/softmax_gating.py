"""The gate of most published models: the k largest of a softmax over all experts, dropless by default."""

import math
from collections.abc import Sequence

import torch

from portmoe.ops.gating import assign_slots, choose_experts, chosen_scores, probabilities
from portmoe.ops.operation import Operation, Sample, rounding
from portmoe.ops.routing import Routing, check_choices, gating_logits
from portmoe.ops.workload import Workload


def softmax_gating(
    logits_SE: torch.Tensor,
    k: int,
    *,
    normalise: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    capacity_factor: float | None = None,
    min_capacity: int = 0,
) -> Routing:
    """Route S tokens to k of E experts each.

    g = softmax(logits) in float32. The choices are the k experts of highest g, the lower index on a tie,
    among those of the ``kept_groups`` groups of experts that hold a token's highest g (Liu et al., 2024,
    arXiv:2405.04434). Slots count token-major: all choices of a token before those of the next.

    Args:
        logits_SE: [S, E], float32 or less precise (then computed in float32). S = 0 is allowed.
        k: choices per token, 1 … the experts of the kept groups.
        normalise: the weights of a token are divided by their sum, before drops.
        scale: multiplies the weights.
        groups: E is a multiple of it; group i is the i-th run of E / groups experts.
        capacity_factor: C = max(min_capacity, ceil(S/E · capacity_factor · k)); None: nothing is dropped and
            C = S, which no expert can exceed.

    Returns:
        Weights are g of the choices, normalised and scaled, then set to 0 where dropped. ``score_SE`` is g,
        differentiable, and ``aux_loss`` is 0: how the load is balanced is judged outside, over whatever
        tokens and layers belong together.

    Raises:
        ValueError: k or the groups do not fit E.
    """
    check_choices(logits_SE, k)
    tokens, experts = logits_SE.shape
    if experts % groups or not 1 <= kept_groups <= groups or k > experts // groups * kept_groups:
        raise ValueError(
            f"groups={groups} must divide {experts} experts, and k={k} be at most the experts of "
            f"kept_groups={kept_groups} of them"
        )
    score_SE = probabilities(logits_SE)
    expert_KS = choose_experts(_of_kept_groups(score_SE, groups, kept_groups), k)
    slot_KS, count_E = assign_slots(expert_KS, experts, by_token=True)
    weight_KS = chosen_scores(score_SE, expert_KS)
    if normalise:
        weight_KS = weight_KS / weight_KS.sum(0)
    if scale != 1.0:
        weight_KS = weight_KS * scale
    capacity = tokens
    if capacity_factor is not None:
        capacity = softmax_capacity(tokens, experts, k, capacity_factor, min_capacity)
        weight_KS = weight_KS * (slot_KS < capacity)
    return Routing(expert_KS, slot_KS, weight_KS, capacity, score_SE.new_zeros(()), count_E, score_SE)


def softmax_capacity(tokens: int, experts: int, k: int, capacity_factor: float, min_capacity: int) -> int:
    """C = max(min_capacity, ceil(S/E · capacity_factor · k)), in float64 and in this order."""
    return max(min_capacity, math.ceil(tokens / experts * capacity_factor * k))


def _of_kept_groups(score_SE: torch.Tensor, groups: int, kept: int) -> torch.Tensor:
    """The scores of the experts a token may choose; others have one below every score."""
    if kept == groups:
        return score_SE
    score_SGe = score_SE.detach().unflatten(1, (groups, -1))
    group_KS = choose_experts(score_SGe.amax(-1), kept)
    kept_SG = torch.zeros(score_SGe.shape[:2], dtype=torch.bool, device=score_SE.device)
    kept_SG.scatter_(1, group_KS.t(), True)
    return score_SGe.masked_fill(~kept_SG.unsqueeze(-1), -0.5).flatten(1)


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    def logits() -> torch.Tensor:
        return gating_logits(workload, generator)

    experts = workload.experts
    k = min(workload.top_k, experts)  # expert parallelism may leave a rank fewer than k

    def normalised(logits_SE: torch.Tensor) -> torch.Tensor:
        # A single choice weighs 1 whatever its logit: what gradient there is, is rounding alone.
        return logits_SE.detach().requires_grad_(k > 1)

    made = [
        Sample("the plain scores", (logits(), k)),
        Sample("normalised", (normalised(logits()), k), {"normalise": True}),
        Sample("scaled", (logits(), k), {"scale": 16.0}),
        Sample("ties", (logits().detach().round().requires_grad_(), k)),
        Sample("a capacity that is rounded up", (logits(), k), {"capacity_factor": 0.7}),
        Sample("the least capacity", (logits(), k), {"capacity_factor": 0.1, "min_capacity": 3}),
        Sample("large logits", (normalised(logits().detach() + 1000), k), {"normalise": True}),
    ]
    groups = next((n for n in (8, 4, 2) if experts % n == 0 and n < experts), 1)
    kept = min(groups, max(1, groups // 2, -(-k * groups // experts)))
    grouped = {"groups": groups, "kept_groups": kept, "scale": 16.0}
    return [*made, Sample("limited to groups", (logits(), k), grouped)]


# A softmax over the experts and one quotient. Integers must agree exactly.
SOFTMAX_GATING = Operation("softmax_gating", softmax_gating, samples, rounding(16, sums=16))
