"""topk_gating and megablock_gating against the loops in gating_oracle, and cases worked out by hand."""

import math
import random

import gating_oracle as oracle
import pytest
import torch
from torch.utils._pytree import tree_leaves

from portmoe.ops import megablock_gating, topk_gating
from portmoe.ops.routing import Routing

CASES = 1500


def random_case(seed):
    """Logits and sizes: few and many experts, S < E, no token, ties, one-sided routers, no capacity."""
    r = random.Random(seed)
    experts = r.choice([1, 2, 3, 4, 5, 8, 13, 64])
    tokens = r.choice([0, 1, 2, 3, 5, 8, 17, 32])
    k = r.choice([1, 2, 3, experts])
    k = min(k, experts)
    factor = r.choice([0.0, 0.25, 0.5, 1.0, 1.1, 1.25, 2.0, float(experts)])
    minimum = r.choice([0, 0, 1, 4])
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * r.choice([1, 4])
    kind = r.choice(["plain", "plain", "ties", "equal", "one expert"])
    if kind == "ties":
        logits = (logits * 2).round() / 2
    elif kind == "equal":
        logits = torch.full_like(logits, 0.3)
    elif kind == "one expert" and tokens:
        logits[:, r.randrange(experts)] += 20
    return logits, experts, k, factor, minimum


def assert_same(routing: Routing, route: oracle.Route, experts: int) -> None:
    assert routing.expert_KS.dtype == routing.slot_KS.dtype == routing.count_E.dtype == torch.int64
    assert routing.weight_KS.dtype == routing.aux_loss.dtype == torch.float32
    assert routing.aux_loss.shape == ()
    assert routing.capacity == route.capacity
    assert isinstance(routing.capacity, int)
    assert routing.expert_KS.tolist() == route.expert
    assert routing.slot_KS.tolist() == route.slot
    assert routing.count_E.tolist() == route.count
    weight = torch.tensor(route.weight, dtype=torch.float64).view(routing.weight_KS.shape)
    torch.testing.assert_close(routing.weight_KS.double(), weight, rtol=1e-5, atol=1e-6)
    assert (routing.weight_KS[routing.slot_KS >= routing.capacity] == 0).all()
    assert math.isclose(routing.aux_loss.item(), route.aux_loss, rel_tol=1e-5, abs_tol=1e-6)
    check_rows(routing, experts)


def check_rows(routing, experts):
    """Each kept choice has a row of its own in both buffers, within its expert's part."""
    static, ragged = routing.static_row_KS.flatten().tolist(), routing.ragged_row_KS.flatten().tolist()
    ends = [0, *routing.ends_E.tolist()]
    assert routing.static_rows == experts * routing.capacity
    assert ends[-1] == routing.ragged_rows == routing.expert_KS.numel()
    kept = 0
    for expert, slot, row, ragged_row in zip(
        routing.expert_KS.flatten().tolist(), routing.slot_KS.flatten().tolist(), static, ragged, strict=True
    ):
        if slot < routing.capacity:
            kept += 1
            assert row == expert * routing.capacity + slot
            assert ragged_row == ends[expert] + slot < ends[expert + 1]
        else:
            assert (row, ragged_row) == (routing.static_rows, routing.ragged_rows)
    assert len({row for row in static if row < routing.static_rows}) == kept
    assert len({row for row in ragged if row < routing.ragged_rows}) == kept


@pytest.mark.parametrize("start", range(0, CASES, 250))
def test_topk_gating_equals_the_loop(start):
    for seed in range(start, start + 250):
        logits, experts, k, factor, minimum = random_case(seed)
        route = oracle.gshard(logits.tolist(), experts, k, factor, minimum)
        assert_same(topk_gating(logits, k, factor, minimum), route, experts)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(4096, 4, 2), (1024, 64, 6)])
def test_gatings_equal_the_loops_at_real_sizes(tokens, experts, k):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens)) * 2
    assert_same(topk_gating(logits, k, 1.0, 4), oracle.gshard(logits.tolist(), experts, k, 1.0, 4), experts)
    route = oracle.megablock(logits.tolist(), experts, k, 1.0, "capacity")
    assert_same(megablock_gating(logits, k, 1.0), route, experts)


@pytest.mark.parametrize("start", range(0, CASES, 250))
def test_random_selection_equals_the_loop(start):
    dropped = 0
    for seed in range(start, start + 250):
        logits, experts, _, factor, minimum = random_case(seed)
        routing = topk_gating(
            logits, 1, factor, minimum, use_rts=True, generator=torch.Generator().manual_seed(seed)
        )
        uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed)).tolist()
        route = oracle.gshard(logits.tolist(), experts, 1, factor, minimum)
        route.slot = oracle.random_selection(route, uniform)
        gate = [oracle.softmax(row) for row in logits.tolist()]
        route.weight = [[gate[s][e] if route.kept(0, s) else 0.0 for s, e in enumerate(route.expert[0])]]
        assert_same(routing, route, experts)
        dropped += sum(not route.kept(0, s) for s in range(len(logits)))
    assert dropped > 100


@pytest.mark.parametrize("mode", ["capacity", "largest", "dropless"])
def test_megablock_gating_equals_the_loop(mode):
    options = {"capacity": {}, "largest": {"drop_tokens": False}, "dropless": {"dropless": True}}[mode]
    for seed in range(CASES // 3):
        logits, experts, k, factor, _ = random_case(seed)
        route = oracle.megablock(logits.tolist(), experts, k, factor, mode)
        routing = megablock_gating(logits, k, factor, **options)
        assert_same(routing, route, experts)
        if mode != "capacity":
            assert (routing.slot_KS < routing.capacity).all()


def test_old_top2_draws_the_second_expert_with_noise():
    changed = 0
    for seed in range(300):
        logits, experts, _, factor, minimum = random_case(seed)
        if experts < 2:
            continue
        routing = topk_gating(
            logits, 2, factor, minimum, use_fused_gating=False, generator=torch.Generator().manual_seed(seed)
        )
        noise = -torch.empty(logits.shape).exponential_(generator=torch.Generator().manual_seed(seed)).log()
        first = [oracle.ranked(row)[0] for row in logits.tolist()]
        noisy = (logits + noise).tolist()
        second = [next(e for e in oracle.ranked(row) if e != f) for row, f in zip(noisy, first, strict=True)]
        route = oracle.gshard(logits.tolist(), experts, 2, factor, minimum, choices=[first, second])
        assert_same(routing, route, experts)
        changed += second != [oracle.ranked(row)[1] for row in logits.tolist()]
    assert changed > 100


def test_rsample_draws_gumbel_noise_before_the_uniform_numbers():
    for seed in range(200):
        logits, experts, _, factor, minimum = random_case(seed)
        routing = topk_gating(
            logits,
            1,
            factor,
            minimum,
            use_rts=True,
            noisy_gate_policy="RSample",
            use_fused_gating=False,
            generator=torch.Generator().manual_seed(seed),
        )
        generator = torch.Generator().manual_seed(seed)
        noise = -torch.empty(logits.shape).exponential_(generator=generator).log()
        uniform = torch.rand(len(logits), generator=generator).tolist()
        chosen = [oracle.ranked(row)[0] for row in (logits + noise).tolist()]
        route = oracle.gshard(logits.tolist(), experts, 1, factor, minimum, choices=[chosen])
        route.slot = oracle.random_selection(route, uniform)
        gate = [oracle.softmax(row) for row in logits.tolist()]
        route.weight = [[gate[s][e] if route.kept(0, s) else 0.0 for s, e in enumerate(chosen)]]
        assert_same(routing, route, experts)


def test_gumbel_noise_samples_from_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(20000, 4)
    routing = topk_gating(
        logits,
        1,
        4.0,
        0,
        noisy_gate_policy="RSample",
        use_fused_gating=False,
        generator=torch.Generator().manual_seed(1),
    )
    share = routing.count_E / 20000
    torch.testing.assert_close(share, torch.softmax(logits[0], 0), rtol=0, atol=0.015)


def test_no_drop_takes_the_largest_count_for_one_choice():
    logits = torch.tensor([[2.0, 0], [2, 0], [2, 0], [0, 2]])
    routing = topk_gating(logits, 1, 0.5, 0, drop_tokens=False)
    assert routing.capacity == 3
    assert routing.slot_KS.tolist() == [[0, 1, 2, 0]]
    assert (routing.weight_KS > 0).all()
    # Two choices ignore the option.
    assert topk_gating(logits, 2, 0.5, 0, drop_tokens=False).capacity == 2


def test_a_dropped_first_choice_still_pushes_second_choices_out():
    # Tokens 0–2 choose expert 0 first and 1 second, token 3 the other way round; C = 2.
    logits = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    routing = topk_gating(logits, 2, 0.5, 0)
    assert routing.capacity == 2
    assert routing.slot_KS.tolist() == [[0, 1, 2, 0], [1, 2, 3, 3]]
    high = math.e / (1 + math.e)
    expected = torch.tensor([[high, 1.0, 0.0, 1.0], [1 - high, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(routing.weight_KS, expected)
    # E² · mean_e(mean g · mean first): g means (3h + 1−h)/4 and its complement, first 3/4 and 1/4.
    mean = (3 * high + 1 - high) / 4
    assert routing.aux_loss.item() == pytest.approx(4 * (mean * 0.75 + (1 - mean) * 0.25) / 2)


def test_capacity_is_rounded_in_the_order_written():
    # S/E · factor · k in float64; k · factor · S / E, or S · factor / E · k, would give one less or more.
    for tokens, experts, factor, k, capacity in [
        (100, 3, 1.1, 3, 111),
        (100, 3, 1.25, 3, 126),
        (100, 5, 1.1, 2, 44),
        (100, 5, 1.1, 3, 66),
    ]:
        assert topk_gating(torch.zeros(tokens, experts), k, factor, 0).capacity == capacity
    assert topk_gating(torch.zeros(3, 10), 3, 1.1, 0).capacity == 1  # 0.99 of a token
    assert topk_gating(torch.zeros(0, 4), 2, 1.0, 4).capacity == 4
    assert topk_gating(torch.zeros(5, 4), 2, 0.0, 0).capacity == 0


def test_megablock_capacity_is_rounded_down_without_a_minimum():
    for tokens, experts, factor, k, capacity in [
        (8, 4, 1.0, 2, 4),
        (7, 4, 1.0, 2, 3),
        (1, 4, 1.0, 2, 0),
        (100, 3, 1.1, 3, 110),  # 110.00000000000001
        (10, 3, 1.2, 3, 12),
        (0, 4, 1.0, 2, 0),
    ]:
        assert megablock_gating(torch.zeros(tokens, experts), k, factor).capacity == capacity


def test_order_is_by_probability_where_it_underflows():
    # exp(−200) and exp(−300) are both 0 in float32: a tie, so the lower index comes second.
    routing = topk_gating(torch.tensor([[-300.0, 0.0, -200.0]]), 2, 3.0, 0)
    assert routing.expert_KS.tolist() == [[1], [0]]
    assert routing.weight_KS.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_overflowed_logits_still_give_valid_rows(value):
    # A step that overflowed is skipped later; until then nothing may index out of range.
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    logits[0, 1] = value
    logits[3] = value
    for routing in (topk_gating(logits, 3, 1.0, 0), megablock_gating(logits, 3, 1.0)):
        check_rows(routing, 4)
        assert all(len(set(of_token)) == 3 for of_token in routing.expert_KS.t().tolist())
        assert routing.weight_KS[:, 0].isnan().any()


def test_low_precision_logits_are_computed_in_float32():
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, exact = topk_gating(logits, 2, 1.0, 0), topk_gating(logits.float(), 2, 1.0, 0)
    assert torch.equal(ours.weight_KS, exact.weight_KS)
    assert ours.weight_KS.dtype == torch.float32


@pytest.mark.parametrize(
    "noisy", [{"use_rts": True}, {"noisy_gate_policy": "RSample", "use_fused_gating": False}]
)
def test_noise_needs_a_generator(noisy):
    with pytest.raises(ValueError, match=r"CPU torch\.Generator"):
        topk_gating(torch.zeros(3, 2), 1, 1.0, 0, **noisy)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="k=3"):
        topk_gating(torch.zeros(3, 2), 3, 1.0, 0)
    with pytest.raises(ValueError, match="k=0"):
        megablock_gating(torch.zeros(3, 2), 0, 1.0)
    with pytest.raises(ValueError, match="RSample"):
        topk_gating(torch.zeros(3, 2), 1, 1.0, 0, noisy_gate_policy="RSample")


def test_jitter_is_not_the_gatings_business():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    ours = topk_gating(logits, 2, 1.0, 0, noisy_gate_policy="Jitter")
    assert torch.equal(ours.weight_KS, topk_gating(logits, 2, 1.0, 0).weight_KS)


def test_routing_can_be_taken_apart_into_its_tensors():
    routing = topk_gating(torch.randn(6, 4), 2, 1.0, 0)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves([routing])) == 5


def finite_difference_cases():
    return [
        ("top-2, drops", lambda x: topk_gating(x, 2, 0.75, 0)),
        ("top-1", lambda x: topk_gating(x, 1, 0.75, 0)),
        ("top-3 of 4", lambda x: topk_gating(x, 3, 1.0, 0)),
        ("all experts", lambda x: topk_gating(x, 4, 4.0, 0)),
        ("megablock", lambda x: megablock_gating(x, 2, 0.75)),
        ("dropless", lambda x: megablock_gating(x, 3, 1.0, dropless=True)),
    ]


@pytest.mark.parametrize("function", [pytest.param(f, id=i) for i, f in finite_difference_cases()])
def test_gradients_by_finite_differences(function):
    for seed in range(5):
        logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        logits.requires_grad_()

        def weights_and_loss(x):
            routing = function(x)
            assert routing.weight_KS.requires_grad  # gradcheck passes over what does not
            assert routing.aux_loss.requires_grad
            return routing.weight_KS, routing.aux_loss

        assert torch.autograd.gradcheck(weights_and_loss, logits)
