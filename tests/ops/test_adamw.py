"""adamw, every implementation, against the update in Python floats and against torch.optim.AdamW."""

import math

import pytest
import torch

from portmoe.backends.torch import ops as torch_ops
from portmoe.ops import adamw

FUNCTIONS = {
    "reference": adamw,
    "fused": torch_ops.ADAMW_FUSED.function,
    "foreach": torch_ops.ADAMW_FOREACH.function,
}
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(5, 3), (7,), (), (0, 4)]


def by_hand(p, g, m, v, step, *, lr, beta1, beta2, eps, weight_decay):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - lr * weight_decay * p
    return p - lr * (m / (1 - beta1**step)) / (math.sqrt(v / (1 - beta2**step)) + eps), m, v


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_one_step_by_hand(function, step):
    values = [(0.5, -2.0, 0.1, 0.3), (-1.0, 1e-3, 0.0, 0.0), (3.0, 0.0, 0.0, 0.0)]
    tensors = [[torch.tensor([row[i] for row in values])] for i in range(4)]
    function(*tensors, step, **SETTINGS)
    for place, row in enumerate(values):
        p, m, v = by_hand(*row, step, **SETTINGS)
        assert tensors[0][0][place].item() == pytest.approx(p, rel=1e-6)
        assert tensors[2][0][place].item() == pytest.approx(m, rel=1e-6)
        assert tensors[3][0][place].item() == pytest.approx(v, rel=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_twenty_steps_follow_torchs_optimizer(function):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=generator) for shape in SHAPES]
    theirs = [t.double().requires_grad_() for t in ours]
    averages = [torch.zeros_like(t) for t in ours]
    squares = [torch.zeros_like(t) for t in ours]
    optimizer = torch.optim.AdamW(
        theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    identities = [t.data_ptr() for t in ours]
    for step in range(1, 21):
        grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
        before = [g.clone() for g in grads]
        function(ours, grads, averages, squares, step, **SETTINGS)
        assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.double()
        optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=1e-5, atol=1e-6)
    assert [t.data_ptr() for t in ours] == identities


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_parameters_that_require_grad_and_empty_lists(function):
    param = torch.ones(3, requires_grad=True)
    function([param], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], 1, **SETTINGS)
    assert param.grad_fn is None
    assert (param < 1).all()
    function([], [], [], [], 1, **SETTINGS)
