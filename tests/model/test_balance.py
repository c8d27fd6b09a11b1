"""The auxiliary losses, against loops in float64."""

import dataclasses
import math
from itertools import chain, pairwise

import pytest
import torch

from portmoe.config.read import load_config
from portmoe.families.architecture import Balance
from portmoe.model.balance import layer_terms, losses, width
from portmoe.ops import Segments, softmax_gating

T, K, LAYERS = 30, 2, 2
MODEL = load_config("tiny_mixtral", ["model.num_local_experts=4"]).architecture
E = MODEL.experts
SEGMENTS = {
    "one": Segments((0, T)),
    "three": Segments((0, 5, 6, T)),
    "padded": Segments((0, 5, 20, T), padded=True),
}


def model_of(over, z=0.0):
    return dataclasses.replace(MODEL, balance=Balance(over, 0.01, z))


def logits(layer):
    return (2 * torch.randn(T, E, generator=torch.Generator().manual_seed(layer))).requires_grad_()


def scores_and_choices(logits_TE):
    rows = logits_TE.tolist()
    scores = [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in rows]
    return scores, [sorted(range(E), key=lambda e: -row[e])[:K] for row in scores]


def load_balance(scores, chosen, factor):
    """factor · Σ_e (choices of e over all choices) · (mean score of e)."""
    total = 0.0
    for e in range(E):
        share = sum(c.count(e) for c in chosen) / sum(len(c) for c in chosen)
        total += share * sum(row[e] for row in scores) / len(scores)
    return factor * total


def expected(over, segments):
    real, total = segments.real, 0.0
    layers = [scores_and_choices(logits(layer)) for layer in range(LAYERS)]
    layers = [(scores[:real], chosen[:real]) for scores, chosen in layers]
    if over == "model":  # over the tokens of all layers together, with shares that add up to K
        together = [list(chain(*parts)) for parts in zip(*layers, strict=True)]
        return load_balance(*together, E * K)
    for scores, chosen in layers:
        if over == "first choice":
            total += load_balance(scores, [c[:1] for c in chosen], E)
        elif over == "layer":
            total += load_balance(scores, chosen, E)
        elif over == "sequence":
            ends = [0]
            for length in segments.real_lengths:
                ends.append(ends[-1] + length)
            parts = [load_balance(scores[a:b], chosen[a:b], E) for a, b in pairwise(ends)]
            total += sum(parts) / len(parts)
    return total


def found(over, segments, z=0.0):
    model, leaves = model_of(over, z), [logits(layer) for layer in range(LAYERS)]
    terms_W = torch.zeros(width(model))
    for leaf in leaves:
        terms_W = terms_W + layer_terms(model, softmax_gating(leaf, K), leaf, segments)
    return *losses(model, terms_W), leaves


@pytest.mark.parametrize("over", ["first choice", "layer", "sequence", "model", "none"])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_a_loss_is_the_loop(over, segments):
    loss, z, _ = found(over, SEGMENTS[segments])
    assert loss.item() == pytest.approx(expected(over, SEGMENTS[segments]), rel=1e-6)
    assert z == 0


@pytest.mark.parametrize("segments", SEGMENTS)
def test_the_z_loss_is_a_mean_over_tokens_summed_over_layers(segments):
    real = SEGMENTS[segments].real
    by_hand = sum(
        sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits(layer).tolist()[:real]) / real
        for layer in range(LAYERS)
    )
    for over in ("model", "sequence", "none"):
        assert found(over, SEGMENTS[segments], z=0.5)[1].item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("over", ["first choice", "layer", "sequence", "model"])
def test_padding_gets_no_gradient_and_every_other_token_some(over):
    segments = SEGMENTS["padded"]
    loss, z, leaves = found(over, segments, z=0.5)
    (loss + z).backward()
    for leaf in leaves:
        assert (leaf.grad[: segments.real].norm(dim=1) > 0).all()
        assert not leaf.grad[segments.real :].any()


def test_a_batch_of_padding_alone_is_zero():
    for over in ("layer", "sequence", "model"):
        loss, z, _ = found(over, Segments((0, T), padded=True), z=0.5)
        assert loss == z == 0


def test_which_loss_a_config_asks_for():
    def of(name, *overrides):
        balance = load_config(name, overrides).architecture.balance
        return balance.over, balance.coefficient, balance.z

    assert of("mixtral_8x7b") == ("model", 0.02, 0.0)
    assert of("deepseek_v2") == ("sequence", 0.001, 0.0)
    assert of("deepseek_v2", "model.seq_aux=false") == ("layer", 0.001, 0.0)
    assert of("qwen3_30b_a3b", "loss.z_loss_coeff=0.1") == ("model", 0.001, 0.1)
    assert of("deepseek_v2", "moe.aux_loss=gshard", "loss.moe_loss_coeff=0.3") == ("first choice", 0.3, 0.0)
    assert of("deepseek_v2", "moe.aux_loss=none") == ("none", 0.0, 0.0)
    assert of("7b_moe4") == ("gate", 0.1, 0.0)
    assert of("7b_moe4", "moe.aux_loss=gshard") == ("gate", 0.1, 0.0)
    assert of("7b_moe4", "moe.aux_loss=none") == ("none", 0.0, 0.0)
