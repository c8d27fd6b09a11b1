"""Products of 16-bit types through float32: no less exact than units that sum in float32."""

import pytest
import torch
import torch.nn.functional as F
from agreement import workload

from portmoe.backends.cpu import linear, products
from portmoe.config import Config
from portmoe.ops import OPERATIONS, choose


@pytest.fixture(params=[True, False], ids=["without units", "with units"])
def slow(request, monkeypatch):
    monkeypatch.setattr(products, "slow_in", lambda dtype: request.param and dtype.itemsize == 2)
    return request.param


def chosen(dtype):
    """The linear map this processor takes."""
    return choose({"linear": OPERATIONS["linear"]}, linear.ALL, workload(dtype), Config()).linear


def test_float32_is_the_way_where_there_are_no_units(slow):
    assert (chosen(torch.bfloat16) is linear.linear) == slow
    assert chosen(torch.float32) is OPERATIONS["linear"].reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_and_its_gradients(slow, dtype, shape, biased):
    generator = torch.Generator().manual_seed(1)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator).to(dtype).requires_grad_()

    leaves = [draw(*shape), draw(6, 8)] + ([draw(6)] if biased else [])
    grad = torch.randn(*shape[:-1], 6, generator=generator).to(dtype)
    out = chosen(dtype)(*leaves, *([] if biased else [None]))
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = F.linear(*doubles)
    assert out.dtype == dtype
    one_rounding = torch.finfo(dtype).eps / 2 if slow and dtype.itemsize == 2 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=1.01 * one_rounding, atol=1e-5)
    ours = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(ours, torch.autograd.grad(expected, doubles, grad.double()), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=1.01 * one_rounding, atol=1e-5)


def test_only_the_gradients_asked_for(slow):
    x_TI, weight_OI = torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(6, 8, dtype=torch.bfloat16)
    out_TO = chosen(torch.bfloat16)(x_TI, weight_OI.requires_grad_(), None)
    out_TO.sum().backward()
    assert weight_OI.grad.eq(3).all()
    assert x_TI.grad is None


def test_a_sum_of_products_is_rounded_once():
    # 256 + 1 + 1 in bfloat16: 258 at once, 256 one by one.
    one, large = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    out = torch.empty(1, 1, dtype=torch.bfloat16)
    products.float32_products(out, (large, one), (one, one), (one, one))
    assert out.item() == 258
