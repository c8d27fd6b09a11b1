"""The Triton kernels against the references in float64 on the CPU, and what they must never read."""

import math

import agreement
import pytest
import torch

from portmoe.backends.cuda.ops import CudaOperations
from portmoe.backends.triton.ops import TRITON
from portmoe.ops import OPERATIONS
from portmoe.ops import combine as plain_combine

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
KERNELS = {implementation.op: implementation.function for implementation in TRITON}


def workload(dtype=torch.float32, **changes):
    sizes = {"tokens": 12, "seq_len": 4, "hidden": 24, "ffn_width": 40, "capacity": 6}
    return agreement.workload(dtype, DEVICE, **(sizes | changes))


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"capacity": 0}, {"tokens": 1, "seq_len": 1, "experts": 1, "top_k": 1}], ids=str
)
def test_it_is_the_same_function(op, dtype, changes):
    agreement.assert_agrees(KERNELS[op], OPERATIONS[op], workload(dtype, **changes))


@pytest.mark.parametrize("hidden", [1, 7, 1500])  # 1500: more than one block
def test_any_width(hidden):
    for op in KERNELS:
        agreement.assert_agrees(
            KERNELS[op], OPERATIONS[op], workload(hidden=hidden, ffn_width=hidden, tokens=4)
        )


def test_rows_without_a_token_are_never_read():
    y = torch.full((6, 5), math.nan, device=DEVICE)
    y[1], y[4] = 2.0, 3.0
    rows, weights = torch.tensor([[1, 6], [4, 9]]), torch.tensor([[0.5, 7.0], [2.0, math.nan]])
    leaves = [y.requires_grad_(), weights.to(DEVICE).requires_grad_()]
    out = KERNELS["combine"](leaves[0], rows.to(DEVICE), leaves[1])
    assert out.tolist() == [[7.0] * 5, [0.0] * 5]
    out.sum().backward()
    assert leaves[0].grad[:, 0].tolist() == [0.0, 0.5, 0.0, 0.0, 2.0, 0.0]
    assert leaves[1].grad.tolist() == [[10.0, 0.0], [15.0, 0.0]]


def test_rows_may_lie_apart_and_gradients_may_be_expanded():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(8, 20, generator=generator).to(DEVICE)
    rows = torch.tensor([[3, 0, 8], [1, 8, 2]], device=DEVICE)
    weights = torch.randn(3, 2, generator=generator).to(DEVICE).t()
    for y in (wide[:, :9], wide[:, ::2], wide.t()[:8]):
        leaf = y.detach().requires_grad_()
        out = KERNELS["combine"](leaf, rows, weights)
        torch.testing.assert_close(out, plain_combine(y, rows, weights))
        out.sum().backward()  # an expanded gradient, of stride 0
        assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("rows", [0, 5])
def test_buffers_and_batches_of_nothing(rows):
    x = torch.randn(0 if rows else 3, 4, device=DEVICE, requires_grad=True)
    places = torch.full((2, x.shape[0]), rows, device=DEVICE)
    buffer = KERNELS["dispatch"](x, places, rows)
    assert buffer.tolist() == torch.zeros(rows, 4).tolist()
    out = KERNELS["combine"](buffer, places, torch.ones(places.shape, device=DEVICE))
    assert out.tolist() == torch.zeros(x.shape[0], 4).tolist()
    out.sum().backward()
    assert x.grad.tolist() == torch.zeros(x.shape).tolist()
    assert KERNELS["swiglu"](x[:0], x[:0]).shape == (0, 4)


def test_they_come_first_where_triton_is():
    offered = [i for i in CudaOperations().implementations() if i.requested_by != "moe.use_tutel"]
    for implementation in TRITON:
        assert next(i for i in offered if i.op == implementation.op) is implementation
        assert implementation.supports(workload()) is None
        assert "float32" in implementation.supports(workload(torch.float64))
