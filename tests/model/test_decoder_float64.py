"""The whole decoder, forward and gradients, against float64 loops written from its description."""

import cmath
import math
from itertools import pairwise

import pytest
import torch

from portmoe.config import Config
from portmoe.data.batch import Batch
from portmoe.model import Decoder
from portmoe.ops import Segments

SEGMENTS = (0, 5, 6, 14)
TOKENS = SEGMENTS[-1]


def make_config(model=None, moe=None, loss=None) -> Config:
    sizes = {
        "dtype": "float32",
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_layers": 2,
        "vocab_size": 200,
        "mlp_ratio": 1.1,
        "multiple_of": 5,
        "num_experts": 3,
    }
    data = {"seq_len": 8}
    return Config.model_validate(
        {"model": sizes | (model or {}), "moe": moe or {}, "data": data, "loss": loss or {}}
    )


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    labels_T = torch.randint(1, 200, (TOKENS,), generator=generator)
    labels_T[[4, 5, 13]] = -100
    positions = [i for a, b in pairwise(SEGMENTS) for i in range(b - a)]
    return Batch(
        tokens_T=torch.randint(200, (TOKENS,), generator=generator),
        labels_T=labels_T,
        positions_T=torch.tensor(positions),
        types_T=torch.zeros(TOKENS, dtype=torch.int64),
        segments=Segments(SEGMENTS),
        index=7,
    )


def make_model(config: Config) -> Decoder:
    """With weights large enough that every term, biases and gains included, shows in the loss."""
    model = Decoder(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.35 * noise)
    return model


def norm(x, gain, eps):
    return torch.stack([row / torch.sqrt((row * row).mean() + eps) * gain for row in x])


def silu(a):
    return a / (1 + torch.exp(-a))


def network(x, w1, w3, w2):
    return w2 @ (silu(w1 @ x) * (w3 @ x))


def rotate(vector, position, config):
    """Each pair as a complex number, turned by position · base^(−2r/D)."""
    pairs = len(vector) // 2
    turned = [None] * len(vector)
    for r in range(pairs):
        a, b = (2 * r, 2 * r + 1) if config.model.qk_interleaved else (r, r + pairs)
        turn = cmath.exp(1j * position * config.model.rope_base ** (-2 * r / len(vector)))
        turned[a] = vector[a] * turn.real - vector[b] * turn.imag
        turned[b] = vector[a] * turn.imag + vector[b] * turn.real
    return torch.stack(turned)


def attention(x, p, config, batch):
    heads = config.model.num_attention_heads
    width = config.model.hidden_size // heads
    rows = p["qkv.weight"].view(heads, 3, width, -1)
    bias = p["qkv.bias"].view(heads, 3, width)
    out = []
    for begin, end in pairwise(SEGMENTS):
        for t in range(begin, end):
            parts = []
            for n in range(heads):
                q = rotate(rows[n, 0] @ x[t] + bias[n, 0], t - begin, config)
                keys = [
                    rotate(rows[n, 1] @ x[j] + bias[n, 1], j - begin, config) for j in range(begin, t + 1)
                ]
                values = [rows[n, 2] @ x[j] + bias[n, 2] for j in range(begin, t + 1)]
                share = torch.softmax(torch.stack([q @ key / math.sqrt(width) for key in keys]), 0)
                parts.append(sum(s * v for s, v in zip(share, values, strict=True)))
            out.append(p["out.weight"] @ torch.cat(parts) + p["out.bias"])
    return torch.stack(out)


def moe(x, p, config, training):
    """(y, aux, assigned, kept)."""
    model, options = config.model, config.moe
    experts, k, tokens = model.num_experts, options.top_k, len(x)
    factor = options.capacity_factor if training else options.eval_capacity_factor
    g = torch.softmax(x @ p["router.weight"].T, dim=1)
    ranked = [sorted(range(experts), key=lambda e, s=s: -g[s, e].item())[:k] for s in range(tokens)]
    first_share = [sum(r[0] == e for r in ranked) / tokens for e in range(experts)]
    if model.moe_type == "GShard":
        capacity = max(options.min_capacity, math.ceil(tokens / experts * factor * k))
        order = [(c, s) for c in range(k) for s in range(tokens)]
        per_expert = sum(g.mean(0)[e] * first_share[e] for e in range(experts))
        aux = experts * per_expert  # E² · mean_e for k = 2 and E · sum_e for k = 1 are one number
    else:
        capacity = int(factor * k * tokens / experts) if model.moe_type == "MegaBlock" else 10**9
        order = [(c, s) for s in range(tokens) for c in range(k)]
        assigned_share = [sum(e in r for r in ranked) / (tokens * k) for e in range(experts)]
        aux = experts * sum(g.mean(0)[e] * assigned_share[e] for e in range(experts))
    if model.moe_type != "MegaBlock-D" and k == 1 and not options.drop_tokens:
        capacity = tokens
    filled, chosen = [0] * experts, [[] for _ in range(tokens)]
    for c, s in order:
        expert = ranked[s][c]
        if filled[expert] < capacity:
            chosen[s].append(expert)
        filled[expert] += 1
    w1, w3 = (p[f"experts.{w}"].view(experts, model.ffn_width, -1) for w in ("w1", "w3"))
    w2 = p["experts.w2"].view(experts, model.hidden_size, -1)
    rows = []
    for s in range(tokens):
        y = torch.zeros_like(x[s])
        total = sum(g[s, e] for e in (chosen[s] if model.moe_type == "GShard" else ranked[s]))
        for e in chosen[s]:
            weight = g[s, e] if k == 1 and model.moe_type == "GShard" else g[s, e] / total
            y = y + weight * network(x[s], w1[e], w3[e], w2[e])
        if model.moe_use_residual:
            c = torch.softmax(p["coefficient.weight"] @ x[s] + p["coefficient.bias"], 0)
            y = y * c[0] + c[1] * network(x[s], *(p[f"residual.{w}.weight"] for w in ("w1", "w3", "w2")))
        rows.append(y)
    return torch.stack(rows), aux, filled, [min(count, capacity) for count in filled]


def decoder(config, weights, batch, training=True):
    """(loss_T, correct_T, aux, assigned, kept) in float64."""

    def under(prefix):
        return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}

    eps, aux, assigned, kept = config.model.layer_norm_epsilon, 0.0, [], []
    x = weights["embedding.weight"][batch.tokens_T]
    for layer in range(config.model.num_layers):
        p = under(f"layers.{layer}.")
        h = norm(x, p["attention_norm.weight"], eps)
        x = x + attention(h, under(f"layers.{layer}.attention."), config, batch)
        h = norm(x, p["feed_forward_norm.weight"], eps)
        if config.model.num_experts > 1 and layer >= config.model.first_k_dense_replace:
            y, layer_aux, layer_assigned, layer_kept = moe(h, under(f"layers.{layer}.moe."), config, training)
            aux = aux + layer_aux
        else:
            w1, w3, w2 = (p[f"feed_forward.{w}.weight"] for w in ("w1", "w3", "w2"))
            y = torch.stack([network(row, w1, w3, w2) for row in h])
            layer_assigned = layer_kept = [0] * config.model.num_experts
        x = x + y
        assigned.append(layer_assigned)
        kept.append(layer_kept)
    logp = torch.log_softmax(norm(x, weights["norm.weight"], eps) @ weights["head.weight"].T, dim=1)
    a, labels = config.loss.label_smoothing, batch.labels_T.tolist()
    losses = [
        logp[t].sum() * 0 if label < 0 else -(1 - a) * logp[t, label] - a * logp[t].mean()
        for t, label in enumerate(labels)
    ]
    correct = [label >= 0 and logp[t].argmax().item() == label for t, label in enumerate(labels)]
    return torch.stack(losses), correct, aux, assigned, kept


def close(actual, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = max(expected.abs().max().item(), 1e-3)
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * scale, f"error {error:.3g} at scale {scale:.3g}"


CASES = {
    "GShard top 2, dropping": make_config(moe={"capacity_factor": 0.6, "min_capacity": 1}),
    "GShard top 2, minimum capacity": make_config(moe={"capacity_factor": 0.1, "min_capacity": 5}),
    "GShard top 1": make_config(moe={"top_k": 1, "use_rts": False, "min_capacity": 2}),
    "GShard top 1, no drops": make_config(moe={"top_k": 1, "drop_tokens": False, "capacity_factor": 0.5}),
    "GShard top 3": make_config(moe={"top_k": 3, "capacity_factor": 0.8}),
    "dense": make_config({"num_experts": 1}),
    "first layer dense": make_config({"first_k_dense_replace": 1}),
    "residual": make_config({"moe_use_residual": True}),
    "MegaBlock": make_config({"moe_type": "MegaBlock"}, moe={"capacity_factor": 0.7}),
    "MegaBlock-D": make_config({"moe_type": "MegaBlock-D"}),
    "interleaved rotary": make_config({"qk_interleaved": True, "rope_base": 50.0}),
    "label smoothing, exact norms": make_config(loss={"label_smoothing": 0.2}).model_copy(
        update={"use_fp32_norm": True}
    ),
    "recomputed": make_config({"checkpoint": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient(case):
    config, batch = CASES[case], make_batch()
    model = make_model(config)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}

    output = model(batch.tokens_T, batch)
    (output.loss_T.mean() + 0.3 * output.aux_loss).backward()
    loss_T, correct, aux, assigned, kept = decoder(config, weights, batch)
    (loss_T.mean() + 0.3 * aux).backward()

    assert output.loss_T.dtype == output.aux_loss.dtype == torch.float32
    close(output.loss_T, loss_T.detach())
    close(output.aux_loss, torch.as_tensor(aux).detach())
    assert output.correct_T.tolist() == correct
    assert output.assigned_LE.tolist() == assigned
    assert output.kept_LE.tolist() == kept
    for name, parameter in model.named_parameters():
        close(parameter.grad, weights[name].grad, 5e-5)


def test_the_dropping_cases_drop_and_the_experts_are_not_balanced():
    for case in ("GShard top 2, dropping", "GShard top 1", "MegaBlock"):
        output = make_model(CASES[case])(make_batch().tokens_T, make_batch())
        assert output.kept_LE.sum() < output.assigned_LE.sum()
        assert output.assigned_LE.max() > output.assigned_LE.min()


def test_evaluation_takes_its_own_capacity_factor():
    config = make_config(moe={"capacity_factor": 2.0, "eval_capacity_factor": 0.5, "min_capacity": 1})
    batch, model = make_batch(), make_model(config)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    output = model.eval()(batch.tokens_T, batch)
    loss_T, _, _, _, kept = decoder(config, weights, batch, training=False)
    close(output.loss_T, loss_T)
    assert output.kept_LE.tolist() == kept
    assert model.train()(batch.tokens_T, batch).kept_LE.tolist() != kept


def test_embed_grad_scale_scales_the_embedding_gradient_only():
    batch, gradients = make_batch(), []
    for scale in (1.0, 0.25):
        model = make_model(make_config({"embed_grad_scale": scale}))
        model(batch.tokens_T, batch).loss_T.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, scaled = gradients
    close(scaled.pop("embedding.weight"), 0.25 * plain.pop("embedding.weight").double(), 1e-6)
    for name in plain:
        close(scaled[name], plain[name], 1e-5)


def test_two_stages_are_the_whole_model():
    config, batch = make_config({"num_layers": 3}), make_batch()
    whole = make_model(config)
    first = Decoder(config, layers=[0], head=False)
    last = Decoder(config, layers=[1, 2], embed=False)
    values = whole.state_dict()
    assert set(first.state_dict()) | set(last.state_dict()) == set(values)
    for stage in (first, last):
        stage.load_state_dict({name: values[name] for name in stage.state_dict()})
    handed = first(batch.tokens_T, batch)
    output = last(handed.x_TH, batch, handed.terms_W)
    expected = whole(batch.tokens_T, batch)
    assert torch.equal(output.loss_T, expected.loss_T)
    assert torch.equal(output.aux_loss, expected.aux_loss)
    assert torch.equal(torch.cat([handed.kept_LE, output.kept_LE]), expected.kept_LE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_float64(dtype):
    """Residual stream, products and probabilities are rounded to 8 or 11 bits; routing is compared first."""
    config, batch = make_config({"dtype": dtype}), make_batch()
    model = make_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.5)  # keeps the two choices of a token clear of each other's rounding
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    output = model(batch.tokens_T, batch)
    loss_T, _, _, assigned, _ = decoder(config, weights, batch)
    output.loss_T.mean().backward()
    loss_T.mean().backward()
    bits = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert output.assigned_LE.tolist() == assigned
    close(output.loss_T, loss_T.detach(), 2 * bits)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        if weights[name].grad.abs().max() > 0:
            close(parameter.grad, weights[name].grad, 16 * bits)
