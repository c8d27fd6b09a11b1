"""Wrong implementations of the softmax gate: one known defect each."""

from dataclasses import replace

import torch
from planting import fault

from portmoe import ops
from portmoe.ops.gating import choose_experts, probabilities, running_count


def planted(name):
    """A defect of the routing that the right gate returns."""

    def add(spoil):
        def wrong(logits, k, **options):
            return spoil(ops.softmax_gating(logits, k, **options), logits, k, **options)

        fault("softmax_gating", name)(wrong)
        return spoil

    return add


def other(name, **changed):
    """The right gate with options that were not asked for."""
    fault("softmax_gating", name)(lambda logits, k, **o: ops.softmax_gating(logits, k, **(o | changed)))


other("weights are always normalised", normalise=True)
other("weights are never normalised", normalise=False)
other("weights are not scaled", scale=1.0)
other("the least capacity is ignored", min_capacity=0)
other("the groups are ignored", groups=1, kept_groups=1)
other("nothing is dropped", capacity_factor=None)


@planted("weights are normalised after drops")
def _(routing, logits, k, *, normalise=False, **_options):
    total = routing.weight_KS.sum(0).clamp(min=1e-7)
    return replace(routing, weight_KS=routing.weight_KS / total) if not normalise else routing


@planted("scaled although normalised")
def _(routing, logits, k, *, normalise=False, **_options):
    return replace(routing, weight_KS=16 * routing.weight_KS) if normalise else routing


@planted("choice-major order of the slots")
def _(routing, logits, k, **_options):
    slot = running_count(routing.expert_KS.flatten(), logits.shape[1])[0]
    return replace(routing, slot_KS=slot.view_as(routing.expert_KS))


@planted("the weights get no gradient")
def _(routing, logits, k, **_options):
    return replace(routing, weight_KS=routing.weight_KS.detach())


@planted("the scores get no gradient")
def _(routing, logits, k, **_options):
    return replace(routing, score_SE=routing.score_SE.detach())


@planted("the scores are those of the kept groups only")
def _(routing, logits, k, *, groups=1, kept_groups=1, **_options):
    if groups == kept_groups:
        return routing
    seen = torch.zeros_like(routing.score_SE).scatter(1, routing.expert_KS.t(), 1.0)
    return replace(routing, score_SE=routing.score_SE * seen)


@planted("the capacity is rounded down")
def _(routing, logits, k, *, capacity_factor=None, min_capacity=0, **_options):
    if capacity_factor is None:
        return routing
    capacity = max(min_capacity, int(len(logits) / logits.shape[1] * capacity_factor * k))
    return replace(routing, capacity=capacity, weight_KS=routing.weight_KS * (routing.slot_KS < capacity))


@planted("a group's score is the sum of its experts'")
def _(routing, logits, k, *, groups=1, kept_groups=1, scale=1.0, **_options):
    if groups == kept_groups:
        return routing
    score = probabilities(logits)
    group = choose_experts(score.unflatten(1, (groups, -1)).sum(-1), kept_groups)
    kept = (
        torch.zeros(len(logits), groups)
        .scatter(1, group.t(), 1.0)
        .repeat_interleave(logits.shape[1] // groups, 1)
    )
    expert = choose_experts(score.masked_fill(kept == 0, -0.5), k)
    weight = score.gather(1, expert.t()).t() * scale
    count = torch.bincount(expert.flatten(), minlength=logits.shape[1])
    slot = running_count(expert.t().flatten(), logits.shape[1])[0].view(-1, k).t()
    return replace(routing, expert_KS=expert, weight_KS=weight, slot_KS=slot, count_E=count)


@planted("ties go to the higher index")
def _(routing, logits, k, **options):
    turned = ops.softmax_gating(logits.flip(1), k, **options)
    expert = logits.shape[1] - 1 - turned.expert_KS
    return replace(turned, expert_KS=expert, count_E=turned.count_E.flip(0), score_SE=turned.score_SE.flip(1))


@planted("probabilities in half precision")
def _(routing, logits, k, **_options):
    return replace(routing, weight_KS=routing.weight_KS.bfloat16().float())
