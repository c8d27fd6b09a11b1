"""Gating, dispatch, experts and combine in a row against a dense float64 formulation, with all gradients.

The control sums every expert's output over every token, weighted by a [S, E] matrix: no slots, no
rows, no buffers. Only which choices survive is taken from the loops in gating_oracle.
"""

import random

import gating_oracle as oracle
import pytest
import torch

from portmoe.backends.cpu import bag_dispatch, buffered_expert_ffn, compiler
from portmoe.backends.cpu import dispatch as compiled_dispatch
from portmoe.backends.cpu import expert_ffn as compiled_expert_ffn
from portmoe.backends.torch import ops as torch_ops
from portmoe.ops import (
    combine,
    dispatch,
    expert_ffn,
    expert_ffn_ragged,
    megablock_gating,
    topk_gating,
)

TORCHS = {
    "dispatch": torch_ops.DISPATCH_GATHER.function,
    "combine": torch_ops.COMBINE_GATHER.function,
    "static": torch_ops.EXPERT_FFN_LOOP.function,
    "ragged": torch_ops.EXPERT_FFN_RAGGED_LOOP.function,
}
REFERENCE = {"dispatch": dispatch, "combine": combine, "static": expert_ffn, "ragged": expert_ffn_ragged}
FOR_CPUS = {
    "dispatch": bag_dispatch.bag_dispatch,
    "combine": bag_dispatch.bag_combine,
    "static": buffered_expert_ffn.ALL[0].function,
    "ragged": buffered_expert_ffn.ALL[2].function,
}
COMPILED = {
    "dispatch": compiled_dispatch.dispatch,
    "combine": compiled_dispatch.combine,
    "static": compiled_expert_ffn.ALL[0].function,
    "ragged": compiled_expert_ffn.ALL[1].function,
}
GROUPED = TORCHS | {"ragged": torch_ops.EXPERT_FFN_GROUPED_MM.function}


def layer(routing, x_SH, w1_EFH, w3_EFH, w2_EHF, form, functions):
    if form == "static":
        buffer = functions["dispatch"](x_SH, routing.static_row_KS, routing.static_rows)
        x_ECH = buffer.view(routing.count_E.numel(), routing.capacity, x_SH.shape[1])
        y_RH = functions["static"](x_ECH, w1_EFH, w3_EFH, w2_EHF).flatten(0, 1)
        return functions["combine"](y_RH, routing.static_row_KS, routing.weight_KS)
    buffer = functions["dispatch"](x_SH, routing.ragged_row_KS, routing.ragged_rows)
    y_RH = functions["ragged"](buffer, routing.ends_E, w1_EFH, w3_EFH, w2_EHF)
    return functions["combine"](y_RH, routing.ragged_row_KS, routing.weight_KS)


def dense(route, logits, x, w1, w3, w2, *, normalise, before_drops):
    """Output and auxiliary loss in float64 for the surviving choices of ``route``."""
    tokens, experts = logits.shape
    choices = len(route.expert)
    gate = logits.exp() / logits.exp().sum(1, keepdim=True)
    kept, chosen = torch.zeros(tokens, experts), torch.zeros(tokens, experts)
    for k in range(choices):
        for s in range(tokens):
            chosen[s, route.expert[k][s]] = 1
            kept[s, route.expert[k][s]] = float(route.kept(k, s))
    weight = gate * kept
    if normalise:
        total = (gate * (chosen if before_drops else kept)).sum(1, keepdim=True)
        weight = weight / total.clamp(min=2.0**-23)
    hidden = torch.einsum("sh,efh->sef", x, w1)
    hidden = hidden / (1 + (-hidden).exp()) * torch.einsum("sh,efh->sef", x, w3)
    out = torch.einsum("se,sef,ehf->sh", weight, hidden, w2)
    if before_drops:
        aux = experts / (tokens * choices) * (chosen.sum(0) * gate.mean(0)).sum()
    else:
        first = torch.nn.functional.one_hot(torch.tensor(route.expert[0]), experts).double()
        aux = experts**2 * (gate.mean(0) * first.mean(0)).mean()
    return out, aux


PATHS = {"reference": REFERENCE, "torch": TORCHS, "grouped": GROUPED, "for CPUs": FOR_CPUS}
if not isinstance(compiler.kernels(), str):
    PATHS["compiled"] = COMPILED


@pytest.mark.parametrize("functions", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("gating", ["gshard", "megablock", "dropless"])
def test_layer_and_every_gradient(gating, functions):
    for seed in range(60):
        r = random.Random(seed)
        tokens, experts = r.choice([1, 2, 5, 12]), r.choice([1, 2, 4, 7])
        k, factor = r.randint(1, min(3, experts)), r.choice([0.0, 0.5, 1.0, 2.0])
        generator = torch.Generator().manual_seed(seed)

        def leaf(*shape, generator=generator):
            return torch.randn(*shape, generator=generator).requires_grad_()

        leaves = [leaf(tokens, experts), leaf(tokens, 8), leaf(experts, 12, 8), leaf(experts, 12, 8)]
        leaves.append(leaf(experts, 8, 12))
        if r.random() < 0.3:  # ties, and experts nobody chooses
            leaves[0] = leaves[0].detach().round().requires_grad_()
        logits = leaves[0].tolist()
        if gating == "gshard":
            route = oracle.gshard(logits, experts, k, factor, r.choice([0, 2]))
            routing = topk_gating(leaves[0], k, 0.0, route.capacity)
        else:
            mode = "dropless" if gating == "dropless" else "capacity"
            route = oracle.megablock(logits, experts, k, factor, mode)
            routing = megablock_gating(leaves[0], k, factor, dropless=mode == "dropless")
        assert routing.expert_KS.tolist() == route.expert
        assert routing.slot_KS.tolist() == route.slot

        doubles = [t.detach().double().requires_grad_() for t in leaves]
        before_drops = gating != "gshard"
        expected, aux = dense(route, *doubles, normalise=before_drops or k > 1, before_drops=before_drops)
        grad_SH = torch.randn(tokens, 8, generator=generator)
        expected_grads = torch.autograd.grad(
            (expected, aux), doubles, (grad_SH.double(), torch.tensor(0.1).double())
        )
        for form in ("static", "ragged"):
            ours = layer(routing, *leaves[1:], form, functions)
            assert_within(ours, expected, 1e-5)
            grads = torch.autograd.grad(
                (ours, routing.aux_loss), leaves, (grad_SH, torch.tensor(0.1)), retain_graph=True
            )
            for grad, expected_grad in zip(grads, expected_grads, strict=True):
                assert_within(grad, expected_grad, 1e-5)


def assert_within(value, expected, share):
    """Largest deviation at most ``share`` of the tensor's largest value (or of one, if that is larger)."""
    assert not value.isnan().any()
    scale = max(1.0, expected.abs().max().item())
    assert (value.double() - expected).abs().max().item() <= share * scale
