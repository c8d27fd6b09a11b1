"""Wrong implementations, each with one defect that ports are known to have. Nothing here is right."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from portmoe import ops
from portmoe.ops.attention import Segments
from portmoe.ops.routing import Routing, probabilities, running_count, top_experts
from portmoe.ops.topk_gating import topk_capacity


@dataclass(frozen=True)
class Fault:
    op: str
    name: str
    function: Callable[..., Any]
    dtype: torch.dtype = torch.float32  # the dtype it shows in
    shapes: str = "odd"  # and one of validation's shapes that shows it


FAULTS: list[Fault] = []


def fault(
    op: str, name: str, dtype: torch.dtype = torch.float32, shapes: str = "odd"
) -> Callable[[Callable], Callable]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS.append(Fault(op, name, function, dtype, shapes))
        return function

    return add


class Backward(torch.autograd.Function):
    """``forward`` with the gradient of ``backward``: two functions of the same arguments."""

    @staticmethod
    def forward(ctx, right, wrong, *args):
        ctx.wrong = wrong
        ctx.args = [a.detach().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in args]
        with torch.no_grad():
            return right(*args)

    @staticmethod
    def backward(ctx, grad):
        leaves = [a for a in ctx.args if torch.is_tensor(a) and a.requires_grad]
        with torch.enable_grad():
            out = ctx.wrong(*ctx.args)
        found = iter(torch.autograd.grad(out, leaves, grad, materialize_grads=True))
        grads = [next(found) if torch.is_tensor(a) and a.requires_grad else None for a in ctx.args]
        return None, None, *grads


class Scaled(torch.autograd.Function):
    """The identity whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


# --- rms_norm -------------------------------------------------------------------------------------


def norm(x, weight, eps, *, dtype=torch.float32, outside=False, mean=False, frozen=False):
    wide = x.to(torch.promote_types(x.dtype, dtype) if dtype == torch.float32 else dtype)
    if mean:
        wide = wide - wide.mean(-1, keepdim=True)
    square = wide.square().mean(-1, keepdim=True)
    scale = 1 / (square.sqrt() + eps) if outside else torch.rsqrt(square + eps)
    if frozen:
        scale = scale.detach()
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


fault("rms_norm", "eps is left out")(lambda x, w, eps: norm(x, w, 0.0))
fault("rms_norm", "eps is added outside the root")(lambda x, w, eps: norm(x, w, eps, outside=True))
fault("rms_norm", "the mean is subtracted")(lambda x, w, eps: norm(x, w, eps, mean=True))
fault("rms_norm", "reduced precision")(lambda x, w, eps: norm(x, w, eps, dtype=torch.bfloat16))
fault("rms_norm", "half precision squares overflow", torch.float16)(
    lambda x, w, eps: norm(x, w, eps, dtype=x.dtype)
)
fault("rms_norm", "the gain gets no gradient")(lambda x, w, eps: norm(x, w.detach(), eps))
fault("rms_norm", "the scale is taken as constant in backward")(
    lambda x, w, eps: norm(x, w, eps, frozen=True)
)
fault("rms_norm", "the gain is 1 + weight")(lambda x, w, eps: norm(x, w + 1, eps))


@fault("rms_norm", "the argument is scaled in place")
def _(x, w, eps):
    out = norm(x, w, eps)
    with torch.no_grad():
        x.mul_(1.5)
    return out


@fault("rms_norm", "float32 comes out in every dtype", torch.bfloat16)
def _(x, w, eps):
    return norm(x.float(), w.float(), eps)


@fault("rms_norm", "strides are ignored")
def _(x, w, eps):
    dense = x.as_strided(x.shape, torch.empty(x.shape).stride(), x.storage_offset())
    return norm(dense, w, eps)


# --- rotary ---------------------------------------------------------------------------------------


def flipped(x, cos, sin, interleaved):
    return ops.rotary(x, cos, sin, not interleaved)


fault("rotary", "halves and pairs are swapped")(flipped)
fault("rotary", "the other direction")(lambda x, cos, sin, i: ops.rotary(x, cos, -sin, i))
fault("rotary", "positions are one off")(
    lambda x, cos, sin, i: ops.rotary(x, cos.roll(1, 0), sin.roll(1, 0), i)
)
fault("rotary", "the table is rounded")(
    lambda x, cos, sin, i: ops.rotary(x, cos.bfloat16().float(), sin.bfloat16().float(), i)
)
fault("rotary", "backward rotates forward")(
    lambda x, cos, sin, i: Backward.apply(
        ops.rotary, lambda x, c, s, i: ops.rotary(x, c, -s, i), x, cos, sin, i
    )
)
fault("rotary", "only the first half of a head is rotated")(
    lambda x, cos, sin, i: torch.cat(
        [ops.rotary(x, cos, sin, i)[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]], -1
    )
)

# --- swiglu ---------------------------------------------------------------------------------------

fault("swiglu", "gate and up are swapped")(lambda gate, up: ops.swiglu(up, gate))
fault("swiglu", "gelu for silu")(lambda gate, up: F.gelu(gate) * up)
fault("swiglu", "the gradient is 1 % too large")(lambda gate, up: Scaled.apply(ops.swiglu(gate, up), 1.01))
fault("swiglu", "the gradient is 1 % too large in half precision", torch.bfloat16, "larger")(
    lambda gate, up: ops.swiglu(Scaled.apply(gate.float(), 1.01), Scaled.apply(up.float(), 1.01)).to(
        gate.dtype
    )
)
fault("swiglu", "backward forgets the sigmoid's own derivative")(
    lambda gate, up: Backward.apply(ops.swiglu, lambda g, u: g * torch.sigmoid(g).detach() * u, gate, up)
)
fault("swiglu", "the exponential overflows")(lambda gate, up: gate * (gate.exp() / (1 + gate.exp())) * up)


@fault("swiglu", "results share one buffer")
def _(gate, up, buffers={}):  # noqa: B006
    out = ops.swiglu(gate, up)
    if out.shape not in buffers:
        buffers[out.shape] = torch.empty_like(out.detach())
    buffer = buffers[out.shape]
    buffer.copy_(out.detach())

    class Shared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return buffer.view_as(buffer)

        @staticmethod
        def backward(ctx, grad):
            return grad

    return Shared.apply(out)


@fault("swiglu", "the last bits differ from call to call")
def _(gate, up):
    return ops.swiglu(gate, up) * (1 + 2e-7 * torch.randint(-1, 2, gate.shape))


# --- attention ------------------------------------------------------------------------------------


def masked_attention(q, k, v, scale, visible, *, shift=True, dtype=torch.float32):
    q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)).transpose(0, 1) for t in (q, k, v))
    scores = ((q @ k.transpose(1, 2)) * scale).masked_fill(~visible, -math.inf).to(dtype)
    weights = torch.softmax(scores, -1) if shift else scores.exp() / scores.exp().sum(-1, keepdim=True)
    return (weights.to(v.dtype) @ v).transpose(0, 1)


def mask(segments: Segments) -> torch.Tensor:
    number = torch.arange(len(segments.lengths)).repeat_interleave(torch.tensor(segments.lengths))
    place = torch.arange(segments.total)
    return (number[:, None] == number) & (place[:, None] >= place)


@fault("attention", "no mask means full attention")
def _(q, k, v, segments, scale):
    full = mask(segments) | mask(segments).t()
    return masked_attention(q, k, v, scale, full).to(q.dtype)


@fault("attention", "the mask's convention is the other one")
def _(q, k, v, segments, scale):
    return masked_attention(q, k, v, scale, ~mask(segments) | torch.eye(len(q), dtype=torch.bool)).to(q.dtype)


@fault("attention", "segments leak into the next one")
def _(q, k, v, segments, scale):
    return masked_attention(q, k, v, scale, torch.ones(len(q), len(q), dtype=torch.bool).tril()).to(q.dtype)


@fault("attention", "a token does not see itself")
def _(q, k, v, segments, scale):
    first = torch.zeros(len(q), dtype=torch.bool)
    first[list(segments.offsets[:-1])] = True
    visible = (mask(segments) & ~torch.eye(len(q), dtype=torch.bool)) | torch.diag(first)
    return masked_attention(q, k, v, scale, visible).to(q.dtype)


@fault("attention", "segments begin one token late")
def _(q, k, v, segments, scale):
    late = (
        Segments((0, *(min(o + 1, segments.total) for o in segments.offsets[1:-1]), segments.total))
        if (len(segments.offsets) > 2 and segments.offsets[-2] + 1 < segments.total)
        else segments
    )
    return ops.attention(q, k, v, late, scale)


@fault("attention", "the softmax does not subtract the maximum")
def _(q, k, v, segments, scale):
    return masked_attention(q, k, v, scale, mask(segments), shift=False).to(q.dtype)


@fault("attention", "the softmax is computed in half precision")
def _(q, k, v, segments, scale):
    return masked_attention(q, k, v, scale, mask(segments), dtype=torch.bfloat16).to(q.dtype)


fault("attention", "the scale is its own choice")(
    lambda q, k, v, s, scale: ops.attention(q, k, v, s, q.shape[-1] ** -1.0)
)
fault("attention", "keys get no gradient")(
    lambda q, k, v, s, scale: ops.attention(q, k.detach(), v, s, scale)
)
fault("attention", "heads and tokens are mixed up")(
    lambda q, k, v, s, scale: ops.attention(q, k, v, s, scale).transpose(0, 1).reshape(q.shape)
)
fault("attention", "the value's gradient is 1 % too small")(
    lambda q, k, v, s, scale: ops.attention(q, k, Scaled.apply(v, 0.99), s, scale)
)

# --- gating ---------------------------------------------------------------------------------------


def gating(
    logits,
    k,
    capacity_factor,
    min_capacity,
    *,
    choose=top_experts,
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
    return gate.shape[1] - 1 - top_experts(gate.flip(1), k)


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

# --- experts --------------------------------------------------------------------------------------


def lost(w):
    """The last expert's weight without its gradient."""
    return torch.cat([w[:-1], w[-1:].detach()])


fault("expert_ffn", "gate and up weights are swapped")(lambda x, w1, w3, w2: ops.expert_ffn(x, w3, w1, w2))
fault("expert_ffn", "experts are one off")(
    lambda x, w1, w3, w2: ops.expert_ffn(x, w1.roll(1, 0), w3.roll(1, 0), w2.roll(1, 0))
)
fault("expert_ffn", "the last expert's gradient is lost")(
    lambda x, w1, w3, w2: ops.expert_ffn(x, lost(w1), lost(w3), lost(w2))
)
fault("expert_ffn", "the up weight's gradient is 1 % too large")(
    lambda x, w1, w3, w2: ops.expert_ffn(x, w1, Scaled.apply(w3, 1.01), w2)
)
fault("expert_ffn", "the last row of every expert is left out")(
    lambda x, w1, w3, w2: ops.expert_ffn(torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], 1), w1, w3, w2)
)
fault("expert_ffn_ragged", "ends are taken for one row less")(
    lambda x, ends, w1, w3, w2: ops.expert_ffn_ragged(
        x, torch.cat([(ends[:-1] - 1).clamp(min=0), ends[-1:]]), w1, w3, w2
    )
)


@fault("expert_ffn_ragged", "an expert without a row has garbage for a gradient")
def _(x, ends, w1, w3, w2):
    empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0

    class Garbage(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.view_as(w)

        @staticmethod
        def backward(ctx, grad):
            return grad.masked_fill(empty.view(-1, 1, 1), 0.125)

    return ops.expert_ffn_ragged(x, ends, Garbage.apply(w1), w3, w2)


@fault("expert_ffn_ragged", "groups of more than 64 rows are cut off", shapes="larger")
def _(x, ends, w1, w3, w2):
    out = ops.expert_ffn_ragged(x, ends, w1, w3, w2)
    starts = ends - torch.diff(ends, prepend=ends.new_zeros(1))
    place = torch.arange(len(x)) - starts[torch.searchsorted(ends, torch.arange(len(x)), right=True)]
    return out * (place < 64).unsqueeze(1)


# --- cross entropy --------------------------------------------------------------------------------


def entropy(x, weight, labels, smoothing, *, shift=True, ignored=0.0, spread=None):
    logits = F.linear(x, weight).float()
    log_sum = logits.logsumexp(1) if shift else logits.exp().sum(1).log()
    target = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    mean = logits.mean(1) if spread is None else (logits.sum(1) - target) / (logits.shape[1] - spread)
    loss = log_sum - (1 - smoothing) * target - smoothing * mean
    return torch.where(labels >= 0, loss, loss * ignored), (logits.argmax(1) == labels)


fault("cross_entropy", "labels are shifted")(
    lambda x, w, labels, a: ops.cross_entropy(
        x, w, torch.where(labels >= 0, labels.roll(1).clamp(min=0), labels), a
    )
)
fault("cross_entropy", "the loss does not subtract the maximum")(
    lambda x, w, labels, a: entropy(x, w, labels, a, shift=False)
)
fault("cross_entropy", "tokens without a label count")(
    lambda x, w, labels, a: entropy(x, w, labels, a, ignored=1.0)
)
fault("cross_entropy", "smoothing leaves out the label's class")(
    lambda x, w, labels, a: entropy(x, w, labels, a, spread=1)
)
fault("cross_entropy", "smoothing is ignored")(lambda x, w, labels, a: ops.cross_entropy(x, w, labels, 0.0))
fault("cross_entropy", "the loss is averaged already")(
    lambda x, w, labels, a: (lambda loss, right: (loss / len(loss), right))(
        *ops.cross_entropy(x, w, labels, a)
    )
)
fault("cross_entropy", "every token counts as wrong")(
    lambda x, w, labels, a: (
        ops.cross_entropy(x, w, labels, a)[0],
        torch.zeros_like(labels, dtype=torch.bool),
    )
)
fault("cross_entropy", "the head gets no gradient")(
    lambda x, w, labels, a: ops.cross_entropy(x, w.detach(), labels, a)
)
fault("cross_entropy", "only 512 classes are seen", shapes="larger")(
    lambda x, w, labels, a: ops.cross_entropy(x, w[:512], torch.where(labels < 512, labels, 0), a)
)

# --- adamw ----------------------------------------------------------------------------------------


def adam(
    params,
    grads,
    avgs,
    squares,
    step,
    *,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    correct=True,
    coupled=False,
    **also,
):
    for p, g, m, v in zip(params, grads, avgs, squares, strict=True):
        if coupled:
            g = g + weight_decay * p
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        first, second = (1 - beta1**step, 1 - beta2**step) if correct else (1.0, 1.0)
        root = (v / second + also.get("inside", 0.0)).sqrt()
        if not coupled:
            p.mul_(1 - also.get("rate", lr) * weight_decay)
        p.sub_(lr * (m / first) / (root + (0.0 if "inside" in also else eps)))


fault("adamw", "no bias correction")(lambda *a, **s: adam(*a, **s, correct=False))
fault("adamw", "weight decay goes through the averages")(lambda *a, **s: adam(*a, **s, coupled=True))
fault("adamw", "weight decay without the learning rate")(lambda *a, **s: adam(*a, **s, rate=1.0))
fault("adamw", "the correction is a step late")(
    lambda p, g, m, v, step, **s: ops.adamw(p, g, m, v, step + 1, **s)
)
fault("adamw", "the betas are swapped")(
    lambda *a, **s: ops.adamw(*a, **(s | {"beta1": s["beta2"], "beta2": s["beta1"]}))
)
fault("adamw", "the last tensor of the list is left out")(
    lambda p, g, m, v, step, **s: ops.adamw(p[:-1], g[:-1], m[:-1], v[:-1], step, **s)
)


@fault("adamw", "gradients are used up")
def _(params, grads, avgs, squares, step, **settings):
    ops.adamw(params, grads, avgs, squares, step, **settings)
    for grad in grads:
        grad.zero_()


@fault("adamw", "eps inside the root")
def _(*args, **settings):
    adam(*args, **settings, inside=settings["eps"])
