"""Wrong implementations of router, gating, dispatch and combine: one known defect each."""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from planting import Backward, Scaled, fault

from portmoe import ops
from portmoe.ops.gating import choose_experts, probabilities, running_count
from portmoe.ops.routing import Routing
from portmoe.ops.topk_gating import topk_capacity

# --- router ---------------------------------------------------------------------------------------

fault("router", "the weight is rounded")(lambda x, w: ops.router(x, w.bfloat16().float()))
fault("router", "the product is one of tokens rounded to half precision")(
    lambda x, w: ops.router(x.bfloat16().to(x.dtype), w)
)
fault("router", "logits come out in the dtype of the tokens", torch.bfloat16)(
    lambda x, w: ops.router(x, w).to(x.dtype)
)
fault("router", "tokens get no gradient")(lambda x, w: ops.router(x.detach(), w))
fault("router", "the weight gets no gradient")(lambda x, w: ops.router(x, w.detach()))
fault("router", "the weight's gradient is a mean over tokens")(
    lambda x, w: ops.router(x, Scaled.apply(w, 1 / len(x)))
)

# --- gating ---------------------------------------------------------------------------------------


def gating(
    logits,
    k,
    capacity_factor,
    min_capacity,
    *,
    choose=choose_experts,
    order=lambda e: e.flatten(),
    unorder=lambda s, k: s.view(k, -1),
    renormalise="after",
    round_up=True,
    extra=0,
    aux=None,
    keep_zero=True,
    **options,
):
    """topk_gating's usual case, with a defect per argument; the other cases are right."""
    if k == 1 or not options.get("use_fused_gating", True):
        if renormalise == "always" and k == 1:
            routing = ops.topk_gating(logits, k, capacity_factor, min_capacity, **options)
            total = routing.weight_KS.sum(0).clamp(min=1e-9)
            return replace(routing, weight_KS=routing.weight_KS / total)
        return ops.topk_gating(logits, k, capacity_factor, min_capacity, **options)
    tokens, experts = logits.shape
    gate = probabilities(logits)
    expert = choose(gate, k)
    slot, count = running_count(order(expert), experts)
    slot = unorder(slot, k)
    capacity = topk_capacity(tokens, experts, k, capacity_factor, min_capacity)
    if not round_up:
        capacity = max(min_capacity, math.floor(tokens / experts * capacity_factor * k))
    kept = slot < capacity + extra
    weight = gate.gather(1, expert.t()).t()
    if renormalise == "before":
        weight = weight / weight.sum(0)
    weight = weight * kept if keep_zero else weight
    if renormalise in ("after", "always"):
        weight = weight / weight.sum(0).clamp(min=torch.finfo(torch.float32).eps)
    loss = ops.topk_gating(logits, k, capacity_factor, min_capacity).aux_loss
    return Routing(expert, slot, weight, capacity, aux(gate, expert, kept, loss) if aux else loss, count)


def higher_on_ties(gate, k):
    return gate.shape[1] - 1 - choose_experts(gate.flip(1), k)


def balance(gate, weights):
    experts = gate.shape[1]
    return experts * (gate.sum(0) * weights).sum() / max(1, len(gate)) ** 2


def kept_only(gate, expert, kept, loss):
    return balance(gate, F.one_hot(expert[0], gate.shape[1])[kept[0]].sum(0))


def all_choices(gate, expert, kept, loss):
    return balance(gate, F.one_hot(expert.flatten(), gate.shape[1]).sum(0)) / len(expert)


def planted(name: str, **defect: Any) -> None:
    fault("topk_gating", name)(lambda *args, **options: gating(*args, **options, **defect))


planted("ties go to the higher index", choose=higher_on_ties)
planted(
    "token-major order of the slots", order=lambda e: e.t().flatten(), unorder=lambda s, k: s.view(-1, k).t()
)
planted(
    "later tokens come first", order=lambda e: e.flip(1).flatten(), unorder=lambda s, k: s.view(k, -1).flip(1)
)
planted("weights are normalised before drops", renormalise="before")
planted("weights are not normalised", renormalise="never")
planted("one choice is normalised to 1", renormalise="always")
planted("the capacity is rounded down", round_up=False)
planted("one row too many is kept", extra=1)
planted("one row too few is kept", extra=-1)
planted("the auxiliary loss does not flow", aux=lambda gate, expert, kept, loss: loss.detach())
planted("the auxiliary loss counts what was kept", aux=kept_only)
planted("the auxiliary loss counts every choice", aux=all_choices)
planted("the auxiliary loss misses a factor E", aux=lambda gate, e, k, loss: loss / gate.shape[1])


def change(routing: Routing, **values: Any) -> Routing:
    return replace(routing, **values)


fault("topk_gating", "the router gets no gradient from the weights")(
    lambda *a, **o: (lambda r: change(r, weight_KS=r.weight_KS.detach()))(ops.topk_gating(*a, **o))
)
fault("topk_gating", "the least capacity is ignored")(
    lambda logits, k, f, least, **o: ops.topk_gating(logits, k, f, 0, **o)
)
fault("topk_gating", "the softmax does not subtract the maximum")(
    lambda logits, k, f, least, **o: (
        lambda r: change(r, weight_KS=r.weight_KS * (logits.exp() / logits.exp()).mean())
    )(ops.topk_gating(logits, k, f, least, **o))
)
fault("topk_gating", "random token selection is not random")(
    lambda *a, **o: ops.topk_gating(*a, **(o | {"use_rts": False}))
)
fault("topk_gating", "noise is left out")(
    lambda *a, **o: ops.topk_gating(*a, **(o | {"use_fused_gating": True, "noisy_gate_policy": None}))
)
fault("topk_gating", "tokens are dropped all the same")(
    lambda *a, **o: ops.topk_gating(*a, **(o | {"drop_tokens": True}))
)
fault("topk_gating", "probabilities in half precision")(
    lambda logits, *a, **o: (lambda r: change(r, weight_KS=r.weight_KS.bfloat16().float()))(
        ops.topk_gating(logits, *a, **o)
    )
)
fault("topk_gating", "counts are taken after drops")(
    lambda *a, **o: (
        lambda r: change(r, count_E=torch.bincount(r.expert_KS[r.kept_KS], minlength=r.count_E.numel()))
    )(ops.topk_gating(*a, **o))
)
fault("megablock_gating", "choice-major order of the slots")(
    lambda logits, k, f, *, drop_tokens=True, dropless=False: (
        lambda r: change(
            r, slot_KS=running_count(r.expert_KS.flatten(), logits.shape[1])[0].view(r.expert_KS.shape)
        )
    )(ops.megablock_gating(logits, k, f, drop_tokens=drop_tokens, dropless=dropless))
)
fault("megablock_gating", "weights are normalised after drops")(
    lambda *a, **o: (lambda r: change(r, weight_KS=r.weight_KS / r.weight_KS.sum(0).clamp(min=1e-7)))(
        ops.megablock_gating(*a, **o)
    )
)
fault("megablock_gating", "the capacity is rounded up")(
    lambda logits, k, f, **o: (
        (lambda r: change(r, capacity=math.ceil(f * k * len(logits) / logits.shape[1])))(
            ops.megablock_gating(logits, k, f, **o)
        )
        if not o
        else ops.megablock_gating(logits, k, f, **o)
    )
)

# --- dispatch and combine -------------------------------------------------------------------------


@fault("dispatch", "rows without a token are stale")
def _(x, row, rows):
    buffer = torch.empty(rows + 1, x.shape[1], dtype=x.dtype)
    return buffer.index_copy(0, row.clamp(max=rows).flatten(), x.repeat(len(row), 1))[:rows]


@fault("dispatch", "a kept buffer is not cleared")
def _(x, row, rows, kept={}):  # noqa: B006
    key = (rows, x.shape[1], x.dtype)
    buffer = kept.setdefault(key, torch.zeros(rows + 1, x.shape[1], dtype=x.dtype)).clone()
    out = buffer.index_copy(0, row.clamp(max=rows).flatten(), x.repeat(len(row), 1))
    kept[key] = out.detach()
    return out[:rows]


@fault("dispatch", "dropped tokens land in the last row")
def _(x, row, rows):
    out = ops.dispatch(x, row, rows)
    dropped = (row >= rows).any(0)
    return torch.cat([out[:-1], out[-1:] + x[dropped][:1]]) if rows and dropped.any() else out


fault("dispatch", "rows are one off")(lambda x, row, rows: ops.dispatch(x, row, rows).roll(1, 0))
fault("dispatch", "only the first choice's gradient returns")(
    lambda x, row, rows: Backward.apply(
        ops.dispatch, lambda x, row, rows: ops.dispatch(x, row[:1], rows), x, row, rows
    )
)
fault("combine", "dropped choices read the last row")(
    lambda y, row, w: ops.combine(y, row.clamp(max=max(0, len(y) - 1)), w)
)
fault("combine", "weights are rounded")(lambda y, row, w: ops.combine(y, row, w.bfloat16().float()))
fault("combine", "the router gets no gradient")(lambda y, row, w: ops.combine(y, row, w.detach()))
fault("combine", "only the first choice counts")(lambda y, row, w: ops.combine(y, row[:1], w[:1]))
fault("combine", "rows that nobody reads are multiplied by zero")(
    lambda y, row, w: ops.combine(y, row, w) + 0 * y.sum() if len(y) else ops.combine(y, row, w)
)
fault("combine", "weights are applied twice in backward")(
    lambda y, row, w: Backward.apply(
        ops.combine, lambda y, r, w: ops.combine(y, r, w * w.detach()), y, row, w
    )
)
fault("combine", "the mean of the choices")(lambda y, row, w: ops.combine(y, row, w / len(row)))
