"""Faults planted in the simulated device do what they say, and nothing else."""

import time

import pytest
import torch
import torch_npu
from torch_npu import faults

from portmoe.backends.npu.grouped_matmul import GroupedLinear

NPU = torch.device("npu", 0)


def swiglu():
    x = torch.linspace(-1, 1, 8, device=NPU, requires_grad=True)
    y = torch_npu.npu_swiglu(x)
    y.sum().backward()
    return y.detach().cpu(), x.grad.cpu()


def test_a_wrong_value_leaves_the_gradient_and_the_reverse():
    value, grad = swiglu()
    with faults.planted("wrong:npu_swiglu:1.01"):
        wrong_value, same_grad = swiglu()
    with faults.planted("gradient:npu_swiglu:1.01"):
        same_value, wrong_grad = swiglu()
    torch.testing.assert_close(wrong_value, value * 1.01)
    torch.testing.assert_close(wrong_grad, grad * 1.01)
    assert torch.equal(same_grad, grad)
    assert torch.equal(same_value, value)
    assert torch.equal(swiglu()[0], value)


def test_nan_in_one_function():
    with faults.planted("wrong:npu_swiglu:nan"):
        assert swiglu()[0].isnan().all()
        assert (
            not torch_npu.npu_rms_norm(torch.ones(2, 2, device=NPU), torch.ones(2, device=NPU))[0]
            .isnan()
            .any()
        )


@pytest.mark.parametrize(
    ("dtype", "planted", "factors"),
    [
        (torch.float32, "npu_grouped_matmul", (1.5, 1.0)),
        (torch.bfloat16, "npu_grouped_matmul", (1.5, 1.0)),
        (torch.bfloat16, "npu_grouped_matmul_add_", (1.0, 1.5)),
    ],
    ids=str,
)
def test_the_gradient_of_a_function_without_autograd(dtype, planted, factors):
    x, w = torch.randn(4, 3, device=NPU).to(dtype), torch.randn(2, 5, 3, device=NPU).to(dtype)
    ends = torch.tensor([1, 4], device=NPU)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = GroupedLinear.apply(*leaves, ends, None)
        y.sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    y, *grads = run()
    with faults.planted(f"gradient:{planted}:1.5"):
        same, *wrong = run()
    assert torch.equal(same, y)
    for ours, theirs, factor in zip(wrong, grads, factors, strict=True):
        torch.testing.assert_close(ours, theirs * factor)


def test_a_function_that_is_not_there():
    with faults.planted("lack:npu_swiglu"):
        assert not hasattr(torch_npu, "npu_swiglu")
        assert hasattr(torch_npu, "npu_rms_norm")
    assert hasattr(torch_npu, "npu_swiglu")


def test_a_function_that_fails_and_one_that_is_slow():
    with faults.planted("fail:npu_swiglu"), pytest.raises(RuntimeError, match="planted"):
        swiglu()
    with faults.planted("slow:npu_swiglu:0.05", "slow:aten::mm:0.05"):
        began = time.perf_counter()
        swiglu()
        torch.ones(2, 2, device=NPU) @ torch.ones(2, 2, device=NPU)
        assert time.perf_counter() - began > 0.1


def test_faults_in_torchs_own_operations():
    x = torch.full((2, 2), 3.0, device=NPU)
    with faults.planted("wrong:aten::mm:2"):
        assert (x @ x).tolist() == [[36.0, 36.0], [36.0, 36.0]]
        assert (x + x).sum() == 24
    with faults.planted("lack:aten::mm"), pytest.raises(NotImplementedError, match="aten::mm"):
        x @ x
    assert (x @ x).tolist() == [[18.0, 18.0], [18.0, 18.0]]


@pytest.mark.parametrize("text", ["", "lack", "break:npu_swiglu", "wrong:npu_swiglu", "fail:aten::mm"])
def test_a_specification_that_means_nothing_is_refused(text):
    with pytest.raises(ValueError, match=r"no fault|could not convert"):
        faults.parse(text)
