"""The gating kernels: the reference's routing exactly, over several blocks of tokens, and its gradients."""

import pytest
import torch
from agreement import workload
from gating_oracle import gshard

from portmoe.backends.triton.ops import TRITON
from portmoe.ops import topk_gating as plain

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
GATING = next(i for i in TRITON if i.op == "topk_gating")
kernel = GATING.function


def drawn(tokens, experts, step):
    """Logits on a grid of ``step``: coarse enough for many ties."""
    generator = torch.Generator().manual_seed(tokens + experts)
    return torch.randn(tokens, experts, generator=generator).div_(step).round_().mul_(step).to(DEVICE)


# 300 tokens of 40 experts are five blocks, the last of them not full; 1 and 2⁶ − 1 are the edges of padding.
@pytest.mark.parametrize(("tokens", "experts", "k"), [(300, 40, 2), (70, 63, 3), (1, 1, 1), (200, 5, 5)])
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_routing_is_the_references_bit_for_bit(tokens, experts, k, factor):
    for step in (1.0, 2.0**-10):
        logits = drawn(tokens, experts, step)
        ours, theirs = kernel(logits, k, factor, 1), plain(logits, k, factor, 1)
        for name in ("expert_KS", "slot_KS", "count_E"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert one.dtype == other.dtype
            assert torch.equal(one, other), name
        assert ours.capacity == theirs.capacity
        torch.testing.assert_close(ours.weight_KS, theirs.weight_KS, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-5, atol=0)


def test_the_routing_is_that_of_loops_over_tokens():
    logits = drawn(150, 33, 0.5)
    ours = kernel(logits, 2, 0.6, 2)
    # float64 tells apart what float32's softmax rounds together: on this grid only equal logits tie.
    route = gshard(logits.tolist(), 33, 2, 0.6, 2)
    assert ours.expert_KS.tolist() == route.expert
    assert ours.slot_KS.tolist() == route.slot
    assert ours.count_E.tolist() == route.count
    torch.testing.assert_close(
        ours.weight_KS.cpu().double(), torch.tensor(route.weight, dtype=torch.float64), rtol=1e-5, atol=1e-7
    )
    assert ours.aux_loss.item() == pytest.approx(route.aux_loss, rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gradients_over_several_blocks(k):
    logits = drawn(150, 33, 2.0**-10)
    weights = torch.randn(k, 150, generator=torch.Generator().manual_seed(1))

    def gradient(gate, leaf):
        leaf = leaf.detach().requires_grad_()
        routing = gate(leaf, k, 0.8, 1)
        loss = (routing.weight_KS * weights.to(leaf)).sum() + 50 * routing.aux_loss
        return torch.autograd.grad(loss, leaf)[0].cpu().double()

    ours, control = gradient(kernel, logits), gradient(plain, logits.cpu().double())
    assert (ours - control).norm() < 1e-6 * control.norm()


@pytest.mark.parametrize("part", ["weight_KS", "aux_loss"])
def test_each_loss_alone_has_its_gradient(part):
    logits = drawn(20, 6, 2.0**-10)
    grads = []
    for gate, leaf in ((kernel, logits.clone()), (plain, logits.cpu().double())):
        leaf.requires_grad_()
        getattr(gate(leaf, 2, 0.5, 1), part).square().sum().backward()
        grads.append(leaf.grad.cpu().double())
    assert grads[1].norm() > 0
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[1].norm()


def test_a_kept_choice_of_nearly_no_probability():
    """Under float32's epsilon the sum of the kept probabilities is clamped, and no longer differentiated."""
    logits = torch.zeros(4, 3, device=DEVICE)
    logits[:, 0] = (
        30.0  # two tokens get this expert; of the others' second choice, e⁻¹⁷ and e⁻¹⁶, all is kept
    )
    logits[:2, 2], logits[2:, 1] = 20.0, torch.tensor([13.0, 14.0])
    found = []
    for gate in (kernel, plain):
        leaf = logits.clone().requires_grad_()
        routing = gate(leaf, 2, 0.0, 2)
        picked = routing.weight_KS[1]
        found += [(picked.detach(), torch.autograd.grad(picked.sum(), leaf)[0])]
    assert routing.kept_KS.tolist() == [[True, True, False, False], [True] * 4]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_nan_in_the_gradient_of_a_dropped_choice_stays_there():
    leaf = drawn(8, 2, 2.0**-10).requires_grad_()
    routing = kernel(leaf, 2, 0.25, 0)
    downstream = torch.where(routing.kept_KS, 1.0, torch.nan)
    routing.weight_KS.backward(downstream)
    assert not routing.kept_KS.all()
    assert leaf.grad.isfinite().all()


def test_it_is_asked_for_and_says_what_it_does_not_take():
    assert GATING.requested_by == "moe.use_fused_gating"
    assert GATING.supports(workload()) is None
    assert "moe.use_rts" in GATING.supports(workload(random_drops=True))
    assert "17 choices" in GATING.supports(workload(top_k=17))
    assert "float32" in GATING.supports(workload(torch.float64))


def test_no_tokens():
    leaf = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    routing = kernel(leaf, 2, 1.0, 4)
    assert routing.slot_KS.shape == routing.weight_KS.shape == (2, 0)
    assert routing.count_E.tolist() == [0] * 4
    assert routing.capacity == 4
    routing.aux_loss.backward()
    assert routing.aux_loss.item() == 0
    assert leaf.grad.shape == (0, 4)
