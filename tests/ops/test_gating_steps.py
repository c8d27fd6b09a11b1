"""A gate of another family, put together of the steps, against a loop over its tokens."""

import torch

from portmoe.ops.gating import assign_slots, balance_loss, choose_experts, chosen_scores

S, E, K = 50, 7, 3


def scores():
    return torch.randn(S, E, generator=torch.Generator().manual_seed(5)).sigmoid().double()


def test_sigmoid_scores_with_some_experts_masked_and_weights_left_as_they_are():
    score_SE = scores().requires_grad_()
    allowed_SE = torch.rand(S, E, generator=torch.Generator().manual_seed(6)) < 0.7
    allowed_SE[:, :K] = True
    expert_KS = choose_experts(score_SE * allowed_SE, K)
    weight_KS = 2.5 * chosen_scores(score_SE, expert_KS)
    for s in range(S):
        left = {e: score_SE[s, e].item() for e in range(E) if allowed_SE[s, e]}
        wanted = sorted(left, key=lambda e: (-left[e], e))[:K]
        assert expert_KS[:, s].tolist() == wanted
        assert weight_KS[:, s].tolist() == [2.5 * left[e] for e in wanted]
    (grad_SE,) = torch.autograd.grad(weight_KS.sum(), score_SE)
    assert grad_SE.sum().item() == 2.5 * K * S
    assert ((grad_SE > 0).sum(1) == K).all()


def test_slots_are_given_choice_by_choice_or_token_by_token():
    expert_KS = choose_experts(scores(), K)
    for by_token in (False, True):
        slot_KS, count_E = assign_slots(expert_KS, E, by_token=by_token)
        places = [(k, s) for s in range(S) for k in range(K)]
        if not by_token:
            places.sort()
        seen = [0] * E
        for k, s in places:
            expert = expert_KS[k, s].item()
            assert slot_KS[k, s] == seen[expert]
            seen[expert] += 1
        assert count_E.tolist() == seen


def test_the_balance_loss_is_one_where_the_load_is_even_and_more_where_it_is_not():
    even_SE = torch.full((8, 4), 0.25, dtype=torch.float64)
    assert balance_loss(even_SE, torch.tensor([4, 4, 4, 4]), 2).item() == 1.0
    tilted_SE = even_SE + torch.tensor([0.15, 0.05, -0.05, -0.15])
    count_E = torch.tensor([8, 6, 2, 0])
    by_hand = 4 * (8 / 16 * 0.40 + 6 / 16 * 0.30 + 2 / 16 * 0.20)
    torch.testing.assert_close(balance_loss(tilted_SE, count_E, 2).item(), by_hand)
    assert balance_loss(torch.zeros(0, 4), torch.zeros(4), 2).item() == 0.0
