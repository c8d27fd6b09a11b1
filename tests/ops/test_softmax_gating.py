"""The softmax gate, against loops over tokens in float64."""

import math

import pytest
import torch
from gating_oracle import ranked, softmax

from portmoe.ops import OPERATIONS, softmax_gating
from portmoe.verify.backend.conformance import check_operation

S, E = 61, 12
CASES = {
    "plain": (3, {}),
    "one choice": (1, {}),
    "normalised": (4, {"normalise": True}),
    "scaled": (3, {"scale": 16.0}),
    "limited to 2 of 4 groups": (3, {"groups": 4, "kept_groups": 2, "scale": 2.5}),
    "limited to 1 of 3 groups": (4, {"groups": 3, "kept_groups": 1, "normalise": True}),
    "a capacity": (3, {"capacity_factor": 0.8, "normalise": True}),
    "a least capacity": (2, {"capacity_factor": 0.1, "min_capacity": 5}),
}
ONE_CHOICE = ("few tokens, many experts",)  # of the shapes validate draws


def oracle(
    logits, k, *, normalise=False, scale=1.0, groups=1, kept_groups=1, capacity_factor=None, min_capacity=0
):
    """experts [k][s], weights [k][s], slots [k][s], capacity."""
    tokens, experts = len(logits), len(logits[0])
    capacity = tokens
    if capacity_factor is not None:
        capacity = max(min_capacity, math.ceil(tokens / experts * capacity_factor * k))
    size, seen = experts // groups, [0] * experts
    expert, weight, slot = ([[] for _ in range(k)] for _ in range(3))
    for row in logits:
        score = softmax(row)
        best = [max(score[g * size : (g + 1) * size]) for g in range(groups)]
        kept = ranked(best)[:kept_groups]
        allowed = [e for e in ranked(score) if e // size in kept][:k]
        total = sum(score[e] for e in allowed) if normalise else 1.0
        for choice, e in enumerate(allowed):
            expert[choice].append(e)
            slot[choice].append(seen[e])
            weight[choice].append(score[e] / total * scale if seen[e] < capacity else 0.0)
            seen[e] += 1
    return expert, weight, slot, capacity, seen


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_loop(case, tied):
    k, options = CASES[case]
    logits_SE = torch.randn(S, E, generator=torch.Generator().manual_seed(3))
    if tied:
        logits_SE = logits_SE.round()
    logits_SE.requires_grad_()
    routing = softmax_gating(logits_SE, k, **options)
    expert, weight, slot, capacity, count = oracle(logits_SE.tolist(), k, **options)
    assert routing.expert_KS.tolist() == expert
    assert routing.slot_KS.tolist() == slot
    assert routing.capacity == capacity
    assert routing.count_E.tolist() == count
    torch.testing.assert_close(routing.weight_KS.double(), torch.tensor(weight).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(routing.score_SE, logits_SE.softmax(-1))
    assert routing.aux_loss == 0
    # the gradient of the kept weights' sum by central differences in float64
    (found_SE,) = torch.autograd.grad(routing.weight_KS.square().sum(), logits_SE)
    for s, e in ((0, 0), (7, expert[0][7]), (S - 1, 5)):
        row = logits_SE[s].tolist()
        values = []
        for step in (1e-6, -1e-6):
            moved = list(row)
            moved[e] += step
            score = softmax(moved)
            chosen = [expert[choice][s] for choice in range(k)]
            total = sum(score[c] for c in chosen) if options.get("normalise") else 1.0
            kept = [c for choice, c in enumerate(chosen) if slot[choice][s] < capacity]
            values.append(sum((score[c] / total * options.get("scale", 1.0)) ** 2 for c in kept))
        assert found_SE[s, e].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3, abs=1e-6)


def test_no_token_and_what_does_not_fit():
    empty = softmax_gating(torch.zeros(0, E), 2, capacity_factor=1.0)
    assert empty.expert_KS.shape == (2, 0)
    assert empty.capacity == 0
    for k, options in (
        (13, {}),
        (2, {"groups": 5}),
        (4, {"groups": 6, "kept_groups": 1}),
        (1, {"kept_groups": 2}),
    ):
        with pytest.raises(ValueError, match="k="):
            softmax_gating(torch.zeros(3, E), k, **options)


def test_the_reference_itself_conforms_where_a_token_has_one_choice():
    """Normalised, a single choice weighs 1: its logits' gradient is rounding, which no sample may ask for."""
    found = check_operation(
        OPERATIONS["softmax_gating"], [], torch.device("cpu"), 0, (torch.float32,), ONE_CHOICE
    )
    assert [(check.name, check.detail) for check in found if check.status == "fail"] == []
