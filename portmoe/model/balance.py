"""How evenly the load lies on the experts, as terms of the loss.

Each layer gives a vector of terms, which are added up over the layers, also from one pipeline stage to the
next, and become losses at the head: so a loss over all layers' tokens together is the same in every layout.
"""

import torch

from portmoe.families.architecture import Architecture
from portmoe.ops import Routing, Segments
from portmoe.ops.gating import balance_loss, running_count

LOSSES = 2  # the sum of the layers' balance losses, and that of their z-losses


def width(model: Architecture) -> int:
    """W, the number of terms: over the whole model, also each expert's share of choices and mean score."""
    return LOSSES + (2 * model.experts if model.balance.over == "model" else 0)


def layer_terms(
    model: Architecture, routing: Routing, logits_TE: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """The terms [W] of one layer, float32, differentiable.

    The balance loss of a layer is, with f_e expert e's share of the choices and P_e its mean score,

    * "gate": what the gate says itself;
    * "first choice": E · Σ f_e P_e, f of first choices only (Lepikhin et al. 2020, arXiv:2006.16668);
    * "layer": E · Σ f_e P_e (Fedus et al. 2021, arXiv:2101.03961);
    * "sequence": the mean of that over the segments (Liu et al. 2024, arXiv:2405.04434);
    * "model": none by itself; each f_e · K and P_e is a term, for ``losses``.

    The z-loss is the mean of log²(Σ exp logits) (Zoph et al. 2022, arXiv:2202.08906). Padding enters nowhere.
    """
    over, real = model.balance.over, segments.real
    loss = z = logits_TE.new_zeros(())
    of_model = logits_TE.new_zeros(width(model) - LOSSES)
    if over == "gate":
        loss = routing.aux_loss
    elif over != "none" and real:
        score_TE, expert_KT = routing.score_SE[:real], routing.expert_KS[:, :real]
        experts = score_TE.shape[1]
        if over == "sequence":
            loss = _of_sequences(score_TE, expert_KT, segments)
        elif over == "first choice":
            loss = balance_loss(score_TE, running_count(expert_KT[0], experts)[1], 1)
        else:
            padded = real < segments.total
            count_E = running_count(expert_KT.flatten(), experts)[1] if padded else routing.count_E
            if over == "layer":
                loss = balance_loss(score_TE, count_E, len(expert_KT))
            else:
                of_model = torch.cat((count_E / real, score_TE.mean(0)))
    if model.balance.z and real:
        z = logits_TE[:real].logsumexp(-1).square().mean()
    return torch.cat((torch.stack((loss, z)), of_model))


def losses(model: Architecture, terms_W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The balance loss and the z-loss of a micro-batch, not yet multiplied by their coefficients.

    Over the whole model: E · Σ_e f_e P_e, f_e (choices a token, so that they add up to K) and P_e being
    means over the tokens of all layers together (the code published with Jiang et al. 2024,
    arXiv:2401.04088).
    """
    loss, z = terms_W[:LOSSES].unbind()
    if model.balance.over == "model":
        layers = len(model.expert_layers)
        share_E, score_E = (terms_W[LOSSES:] / max(1, layers)).chunk(2)
        loss = model.experts * (share_E * score_E).sum()
    return loss, z


def _of_sequences(score_TE: torch.Tensor, expert_KT: torch.Tensor, segments: Segments) -> torch.Tensor:
    """mean over segments b of Σ_e (count_be · E / (K · length_b)) · mean over b of score_e."""
    choices, experts = len(expert_KT), score_TE.shape[1]
    lengths = segments.real_lengths
    device = score_TE.device
    length_B = torch.tensor(lengths, dtype=torch.float32).to(device)
    segment_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
    score_BE = score_TE.new_zeros(len(lengths), experts).index_add_(0, segment_T, score_TE)
    place_KT = segment_T * experts + expert_KT
    count_BE = running_count(place_KT.flatten(), len(lengths) * experts)[1].view_as(score_BE)
    of_segment_B = (score_BE * count_BE).sum(1) * experts / (choices * length_B.square())
    return of_segment_B.mean()
