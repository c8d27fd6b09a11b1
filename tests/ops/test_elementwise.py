"""rms_norm, rotary and swiglu against their definitions, written in float64 another way."""

import cmath

import pytest
import torch

from portmoe.backends.torch import ops as torch_ops
from portmoe.ops import rms_norm, rotary, swiglu

NORMS = {"reference": rms_norm, "torch": torch_ops.RMS_NORM.function}
SWIGLUS = {"reference": swiglu, "silu": torch_ops.SWIGLU.function}
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype).requires_grad_()


def assert_matches(out, leaves, expected_of, tolerance):
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = expected_of(*doubles)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    grad = normal(*out.shape, seed=7).to(out.dtype)
    theirs = torch.autograd.grad(expected, doubles, grad.double())
    for a, b in zip(torch.autograd.grad(out, leaves, grad), theirs, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double() / scale, b / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_rms_norm(function, dtype, tolerance, scale):
    x_TH, weight_H = normal(5, 16, dtype=dtype, scale=scale), normal(16, dtype=dtype, seed=1)
    out = function(x_TH, weight_H, 1e-5)
    assert out.dtype == dtype

    def definition(x, w):
        rows = [row * (row.dot(row) / 16 + 1e-5) ** -0.5 for row in x]
        return torch.stack(rows) * w

    assert_matches(out, [x_TH, weight_H], definition, tolerance)


@pytest.mark.parametrize("function", NORMS.values(), ids=NORMS)
def test_rms_norm_keeps_a_float32_weight_exact(function):
    # x has rms sqrt(2.5): 2 · 1.00390625 / 1.5811 = 1.26985, the nearest bfloat16 is 1.2734. A weight
    # rounded to bfloat16 first would be 1 and give 1.2656.
    x_TH = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    out = function(x_TH, torch.full((2,), 1 + 2.0**-8), 0.0)
    assert out.dtype == torch.bfloat16
    assert out[0, 1].item() == 1.2734375


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES[:2])
def test_rotary_is_a_complex_rotation(interleaved, dtype, tolerance):
    x_TND = normal(4, 2, 6, dtype=dtype)
    angle_TR = torch.rand(4, 3, generator=torch.Generator().manual_seed(2)) * 50
    out = rotary(x_TND, angle_TR.cos(), angle_TR.sin(), interleaved)
    assert out.dtype == dtype
    for t in range(4):
        for n in range(2):
            for r in range(3):
                a, b = (2 * r, 2 * r + 1) if interleaved else (r, r + 3)
                turned = complex(x_TND[t, n, a].item(), x_TND[t, n, b].item()) * cmath.exp(
                    1j * angle_TR[t, r].item()
                )
                assert out[t, n, a].item() == pytest.approx(turned.real, abs=tolerance * 3)
                assert out[t, n, b].item() == pytest.approx(turned.imag, abs=tolerance * 3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_gradient_is_the_rotation_back(interleaved):
    x_TND, grad = normal(4, 2, 6), normal(4, 2, 6, seed=5).detach()
    angle_TR = torch.rand(4, 3, generator=torch.Generator().manual_seed(2)) * 50
    out = rotary(x_TND, angle_TR.cos(), angle_TR.sin(), interleaved)
    (ours,) = torch.autograd.grad(out, x_TND, grad)
    torch.testing.assert_close(ours, rotary(grad, angle_TR.cos(), -angle_TR.sin(), interleaved))
    assert torch.allclose(out.norm(), x_TND.norm())


@pytest.mark.parametrize("function", SWIGLUS.values(), ids=SWIGLUS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8)], ids=str)
def test_swiglu(function, dtype, tolerance, shape):
    gate, up = normal(*shape, dtype=dtype, scale=3.0), normal(*shape, dtype=dtype, seed=1)
    out = function(gate, up)
    assert (out.dtype, out.shape) == (dtype, torch.Size(shape))
    if out.numel():
        assert_matches(out, [gate, up], lambda g, u: g * u / (1 + torch.exp(-g)), tolerance)


@pytest.mark.parametrize("function", SWIGLUS.values(), ids=SWIGLUS)
def test_swiglu_saturates_without_nan(function):
    gate = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    out = function(gate, torch.full((3,), 2.0))
    assert out.tolist() == [0.0, 0.0, 2e4]
    out.sum().backward()
    assert gate.grad.tolist() == [0.0, 1.0, 2.0]
