"""The three steps a gate is made of: choose experts, assign them rows, balance their load.

``topk_gating`` and ``megablock_gating`` are compositions of them, and so is any other gate: scores of any
kind (a softmax, a sigmoid, some experts masked out) go through the same steps, and end in a ``Routing``.
Kept apart, they fix what gates differ in: which scores, in which order slots are given, what is normalised.
"""

from collections.abc import Callable

import torch

# expert_A, experts → slot_A, count_E: numbers the assignments of each expert in the order they are listed.
Count = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def probabilities(logits_SE: torch.Tensor) -> torch.Tensor:
    """softmax over the experts in float32: the scores of most gates."""
    return torch.softmax(logits_SE.to(torch.promote_types(logits_SE.dtype, torch.float32)), dim=1)


def choose_experts(score_SE: torch.Tensor, k: int) -> torch.Tensor:
    """[K, S] int64: the k experts of highest score, first choice first, the lower index on a tie.

    By k rounds of ``argmax``, which takes the first of equal values; ``topk`` leaves their order open.

    Args:
        score_SE: none below 0, as probabilities are.
    """
    left_SE, rounds = score_SE.detach().clone(), []
    for _ in range(k):
        rounds.append(left_SE.argmax(dim=1))
        left_SE.scatter_(1, rounds[-1].unsqueeze(1), -1.0)  # below every score
    return torch.stack(rounds)


def chosen_scores(score_SE: torch.Tensor, expert_KS: torch.Tensor) -> torch.Tensor:
    """[K, S]: the score of each choice, differentiable: what its expert's output is weighted by."""
    return score_SE.gather(1, expert_KS.t()).t()


def assign_slots(
    expert_KS: torch.Tensor, experts: int, *, by_token: bool = False, count: Count | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """slot_KS, each choice's place in its expert, and count_E, how many choices an expert has; int64.

    What finds no place below an expert's capacity is dropped, so the order decides who is.

    Args:
        by_token: all choices of a token come before those of the next; False: all first choices come
            before all second ones, each in token order.
        count: numbers the assignments; None: ``running_count``.
    """
    choices, tokens = expert_KS.shape
    count = count or running_count
    if by_token:
        slot_A, count_E = count(expert_KS.t().flatten(), experts)
        return slot_A.view(tokens, choices).t(), count_E
    slot_A, count_E = count(expert_KS.flatten(), experts)
    return slot_A.view(choices, tokens), count_E


def running_count(expert_A: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the assignments of each expert in the order they are listed.

    Args:
        expert_A: [A] int64 in 0 … experts − 1, an expert per assignment.

    Returns:
        slot_A, how many earlier assignments chose the same expert; count_E, how many did in all.
    """
    sorted_A, order_A = expert_A.sort(stable=True)
    ends_E = torch.searchsorted(sorted_A, torch.arange(experts, device=expert_A.device), right=True)
    count_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    place_A = torch.arange(expert_A.numel(), device=expert_A.device)
    slot_A = torch.empty_like(place_A).scatter_(0, order_A, place_A - (ends_E - count_E)[sorted_A])
    return slot_A, count_E


def balance_loss(score_SE: torch.Tensor, count_E: torch.Tensor, choices: int) -> torch.Tensor:
    """E · Σ_e (share of the choices that went to e) · (mean_s score[s, e]); 0 for S = 0.

    Least, at 1 for probabilities, where the load is even (Fedus et al., 2021).

    Args:
        count_E: choices of each expert before drops, ``choices`` of each token.
    """
    tokens, experts = score_SE.shape
    return experts * (score_SE.sum(0) * count_E).sum() / (max(1, tokens) ** 2 * choices)
