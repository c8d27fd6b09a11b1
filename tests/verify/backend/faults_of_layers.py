"""Wrong implementations of norm, rotary embedding, SwiGLU and attention: one known defect each."""

import math

import torch
import torch.nn.functional as F
from planting import Backward, Scaled, fault

from portmoe import ops
from portmoe.ops.attention import Segments

# --- linear ---------------------------------------------------------------------------------------

fault("linear", "the bias is left out")(lambda x, w, bias: ops.linear(x, w, None))
fault("linear", "the bias gets no gradient")(
    lambda x, w, bias: ops.linear(x, w, None if bias is None else bias.detach())
)
fault("linear", "the weight's gradient misses the last row")(
    lambda x, w, bias: torch.cat((ops.linear(x[:-1], w, bias), ops.linear(x[-1:], w.detach(), bias)))
)
fault("linear", "the weight is rounded to bfloat16")(
    lambda x, w, bias: ops.linear(x, w.bfloat16().to(w.dtype), bias)
)
fault("linear", "the last number of every row is not read", torch.bfloat16)(
    lambda x, w, bias: ops.linear(x[..., :-1], w[:, :-1], bias)
)

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

fault("attention", "the heads of a group are not neighbours", shapes="grouped heads")(
    lambda q, k, v, segments, scale: ops.attention(
        q, *(t.repeat(1, q.shape[1] // t.shape[1], 1) for t in (k, v)), segments, scale
    )
)
fault("attention", "values are cut to the keys' width", shapes="wide values")(
    lambda q, k, v, segments, scale: F.pad(
        ops.attention(q, k, v[..., : q.shape[-1]], segments, scale), (0, v.shape[-1] - q.shape[-1])
    )
)
fault("attention", "the logarithm is that of base two", shapes="log-sum-exp")(
    lambda q, k, v, segments, scale, log_sum: (lambda out, log_sum_TN: (out, log_sum_TN / math.log(2)))(
        *ops.attention(q, k, v, segments, scale, log_sum)
    )
)
fault("attention", "the logarithm has no gradient", shapes="log-sum-exp")(
    lambda q, k, v, segments, scale, log_sum: (lambda out, log_sum_TN: (out, log_sum_TN.detach()))(
        *ops.attention(q, k, v, segments, scale, log_sum)
    )
)
