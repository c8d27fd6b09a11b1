"""GShard's gating (Lepikhin et al., 2020) with the benchmark's choices, drops and weights.

g = softmax(logits) in float32. The k experts of highest g are a token's choices; each expert takes
up to C of them. For k ≥ 2 all first choices come before all second ones, in token order; what
finds its expert full is dropped, and the weights are g normalised over a token's surviving choices.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from portmoe.ops.gating import (
    Count,
    assign_slots,
    balance_loss,
    choose_experts,
    chosen_scores,
    probabilities,
    running_count,
)
from portmoe.ops.operation import Operation, Sample, rounding
from portmoe.ops.routing import Routing, check_choices, gating_logits
from portmoe.ops.workload import Workload

NoisyGatePolicy = Literal["Jitter", "RSample"] | None


def topk_gating(
    logits_SE: torch.Tensor,
    k: int,
    capacity_factor: float,
    min_capacity: int,
    *,
    drop_tokens: bool = True,
    use_rts: bool = False,
    noisy_gate_policy: NoisyGatePolicy = None,
    use_fused_gating: bool = True,
    generator: torch.Generator | None = None,
) -> Routing:
    """Route S tokens to k of E experts each.

    C = max(min_capacity, ceil(S/E · capacity_factor · k)); it may exceed S or be 0.
    The auxiliary loss is E² · mean_e(mean_s g · mean_s first choice), before drops; 0 for S = 0.

    Args:
        logits_SE: [S, E], float32 or less precise (then computed in float32). S = 0 is allowed.
        k: choices per token, 1 … E.
        drop_tokens: k = 1 only; False: C is the largest number of tokens an expert was chosen by.
        use_rts: k = 1 only; an expert chosen by more than C tokens keeps C of them at random, in
            token order; the others get the slots from C on, also in token order. False: the first C.
        noisy_gate_policy: k = 1 only: "RSample" chooses the argmax of logits + Gumbel noise (to be
            passed in training only). "Jitter" acts on the router's input and changes nothing here.
        use_fused_gating: False with k = 2 is other mathematics: the second choice is the argmax of
            logits + Gumbel noise over the experts that are not the first choice.
        generator: a CPU generator the noise is drawn from: first Gumbel noise [S, E] where the
            options above need it, then uniform numbers [S] where use_rts does.

    Returns:
        For k = 1 the weight of a kept choice is g itself. For k ≥ 2 it is g over the sum of the
        token's kept g, that sum clamped to float32's epsilon. NaN logits are undefined.

    Raises:
        ValueError: k is not in 1 … E, "RSample" with use_fused_gating, or noise without a CPU generator.
    """
    return topk_gating_by(
        running_count,
        logits_SE,
        k,
        capacity_factor,
        min_capacity,
        drop_tokens=drop_tokens,
        use_rts=use_rts,
        noisy_gate_policy=noisy_gate_policy,
        use_fused_gating=use_fused_gating,
        generator=generator,
    )


def topk_gating_by(
    count: Count,
    logits_SE: torch.Tensor,
    k: int,
    capacity_factor: float,
    min_capacity: int,
    *,
    drop_tokens: bool = True,
    use_rts: bool = False,
    noisy_gate_policy: NoisyGatePolicy = None,
    use_fused_gating: bool = True,
    generator: torch.Generator | None = None,
) -> Routing:
    """``topk_gating`` with slots numbered by ``count``, which has the contract of ``running_count``."""
    check_choices(logits_SE, k)
    if noisy_gate_policy == "RSample" and use_fused_gating:
        raise ValueError("noisy_gate_policy='RSample' needs use_fused_gating=False")
    tokens, experts = logits_SE.shape
    gate_SE = probabilities(logits_SE)
    capacity = topk_capacity(tokens, experts, k, capacity_factor, min_capacity)

    expert_KS = choose_experts(gate_SE, k)
    if k == 1 and noisy_gate_policy == "RSample":
        expert_KS = _noisy(logits_SE, generator).argmax(dim=1).unsqueeze(0)
    elif k == 2 and not use_fused_gating:
        others_SE = _noisy(logits_SE, generator).scatter(1, expert_KS[0].unsqueeze(1), -math.inf)
        expert_KS = torch.stack([expert_KS[0], others_SE.argmax(dim=1)])

    slot_KS, count_E = assign_slots(expert_KS, experts, count=count)
    if k == 1 and not drop_tokens:
        capacity = int(count_E.max())
    elif k == 1 and use_rts:
        slot_KS = _random_selection(expert_KS[0], experts, capacity, generator).unsqueeze(0)

    kept_KS = slot_KS < capacity
    weight_KS = chosen_scores(gate_SE, expert_KS) * kept_KS
    if k > 1:
        weight_KS = weight_KS / weight_KS.sum(0).clamp(min=torch.finfo(torch.float32).eps)
    first_E = count_E if k == 1 else running_count(expert_KS[0], experts)[1]
    aux_loss = balance_loss(gate_SE, first_E, 1)
    return Routing(expert_KS, slot_KS, weight_KS, capacity, aux_loss, count_E)


def topk_capacity(tokens: int, experts: int, k: int, capacity_factor: float, min_capacity: int) -> int:
    """C = max(min_capacity, ceil(S/E · capacity_factor · k)), in float64 and in this order."""
    return max(min_capacity, math.ceil(tokens / experts * capacity_factor * k))


def _noisy(logits_SE: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Logits plus standard Gumbel noise, −log of an exponential."""
    noise_SE = -torch.empty(logits_SE.shape).exponential_(generator=_cpu(generator)).log()
    return logits_SE.detach() + noise_SE.to(logits_SE.device)


def _random_selection(
    expert_S: torch.Tensor, experts: int, capacity: int, generator: torch.Generator | None
) -> torch.Tensor:
    """Slots in which each expert's ``capacity`` tokens of highest random number come first."""
    uniform_S = torch.rand(expert_S.shape, generator=_cpu(generator)).to(expert_S.device)
    # Within an expert: rank by the random number, then number the chosen and the others in token order.
    by_number_S = uniform_S.argsort(descending=True, stable=True)
    rank_S = torch.empty_like(expert_S)
    rank_S[by_number_S] = running_count(expert_S[by_number_S], experts)[0]
    late_S = rank_S >= capacity
    by_turn_S = late_S.long().argsort(stable=True)
    slot_S = torch.empty_like(expert_S)
    slot_S[by_turn_S] = running_count(expert_S[by_turn_S], experts)[0]
    return slot_S


def _cpu(generator: torch.Generator | None) -> torch.Generator:
    if generator is None or generator.device != torch.device("cpu"):
        raise ValueError(f"generator={generator}: this gating draws noise and needs a CPU torch.Generator")
    return generator


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    def logits(tokens: int | None = None) -> torch.Tensor:
        return gating_logits(workload, generator, tokens)

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator)))

    tied_SE = logits().detach().round().requires_grad_()
    one_sided_SE = logits().detach()
    one_sided_SE[:, 0] = one_sided_SE.amax(dim=1) + 1
    large_SE = (logits().detach() + 1000).requires_grad_()  # exp overflows float32
    k = min(workload.top_k, workload.experts)  # expert parallelism may leave a rank fewer than k
    made = [
        Sample("normal", (logits(), k, 1.0, 4)),
        Sample("ties", (tied_SE, k, 1.0, 4)),
        Sample("every token to one expert", (one_sided_SE.requires_grad_(), k, 1.0, 4)),
        Sample("fewer tokens than experts", (logits(max(1, workload.experts // 2)), k, 1.0, 0)),
        Sample("no capacity", (logits(), k, 0.0, 0)),
        Sample("nothing dropped", (logits(), k, float(workload.experts), 4)),
        Sample("a capacity that is rounded up", (logits(), k, 0.7, 0)),
        # Few tokens keep more than one choice: what gradient there is, is rounding alone.
        Sample("the least capacity", (logits().detach(), k, 0.1, 3)),
        Sample("large logits", (large_SE, k, 1.0, 4)),
        Sample("one choice", (logits(), 1, 0.7, 0)),
        Sample("one choice, none dropped", (logits(), 1, 0.7, 0), {"drop_tokens": False}),
        Sample(
            "one choice, random selection", (logits(), 1, 0.7, 0), {"use_rts": True, "generator": noise()}
        ),
        Sample(
            "one choice, RSample",
            (logits(), 1, 0.7, 0),
            {"noisy_gate_policy": "RSample", "use_fused_gating": False, "generator": noise()},
        ),
    ]
    if workload.experts > 1:
        noisy = {"use_fused_gating": False, "generator": noise()}
        made.append(Sample("noisy second choice", (logits(), 2, 0.7, 0), noisy))
    return made


# A softmax over the experts, one quotient; means over the tokens. Integers must agree exactly.
TOPK_GATING = Operation("topk_gating", topk_gating, samples, rounding(16, sums=16))
