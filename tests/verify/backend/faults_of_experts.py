"""Wrong implementations of the experts, the loss and the optimizer: one known defect each."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from planting import Backward, Scaled, fault

from portmoe import ops

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

CUT = "a cut vocabulary"
fault("cross_entropy", "a cut vocabulary is taken for its first run of classes", shapes=CUT)(
    lambda x, w, labels, a, cut: ops.cross_entropy(x, w, labels, a, replace(cut, first=0))
)
fault("cross_entropy", "smoothing is spread over this rank's classes", shapes=CUT)(
    lambda x, w, labels, a, cut: ops.cross_entropy(x, w, labels, a, replace(cut, classes=len(w)))
)
fault("cross_entropy", "the statistics of the other ranks are not asked for", shapes=CUT)(
    lambda x, w, labels, a, cut: ops.cross_entropy(x, w, labels, a, replace(cut, combine=lambda mine: mine))
)
fault("cross_entropy", "the softmax of the gradient is over this rank's classes", shapes=CUT)(
    lambda x, w, labels, a, cut: (
        Backward.apply(
            lambda *args: ops.cross_entropy(*args, cut)[0],
            lambda *args: ops.cross_entropy(*args, replace(cut, combine=lambda mine: mine))[0],
            *(x, w, labels, a),
        ),
        ops.cross_entropy(x, w, labels, a, cut)[1],
    )
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
