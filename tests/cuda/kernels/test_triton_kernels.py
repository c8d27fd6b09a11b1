"""The Triton kernels against the references in float64 on the CPU, and what they must never read."""

import math

import pytest
import torch
from torch.utils._pytree import tree_map

from portmoe.backends.cuda.ops import TRITON, CudaOperations
from portmoe.ops import OPERATIONS, Workload
from portmoe.ops import combine as plain_combine

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
KERNELS = {implementation.op: implementation.function for implementation in TRITON}


def workload(dtype=torch.float32, **changes):
    sizes = {
        "tokens": 12,
        "seq_len": 4,
        "hidden": 24,
        "heads": 2,
        "head_dim": 8,
        "ffn_width": 40,
        "vocab": 40,
        "experts": 4,
        "top_k": 2,
        "capacity": 6,
        "equal_segments": True,
    }
    return Workload(device=DEVICE, dtype=dtype, **(sizes | changes))


def outcome(function, sample, control):
    """The result and every gradient; the control computes in float64 on the CPU."""

    def fresh(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        value = leaf.detach().clone()
        if control:
            value = value.cpu().double() if leaf.is_floating_point() else value.cpu()
        return value.requires_grad_(leaf.requires_grad)

    args = tree_map(fresh, sample.args)
    out = function(*args)
    wanted = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    downstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(out, wanted, downstream.to(out.device, out.dtype), materialize_grads=True)
    return [out, *grads]


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"capacity": 0}, {"tokens": 1, "seq_len": 1, "experts": 1, "top_k": 1}], ids=str
)
def test_it_is_the_same_function(op, dtype, changes):
    operation = OPERATIONS[op]
    for sample in operation.samples(workload(dtype, **changes), torch.Generator().manual_seed(0)):
        ours = outcome(KERNELS[op], sample, control=False)
        theirs = outcome(operation.reference, sample, control=True)
        for value, expected in zip(ours, theirs, strict=True):
            needed = operation.tolerance(sample).needed(value, expected)
            assert needed <= 1, f"{sample.label}: needs {needed:.2f} of the tolerance"


@pytest.mark.parametrize("hidden", [1, 7, 1500])  # 1500: more than one block
def test_any_width(hidden):
    generator = torch.Generator().manual_seed(0)
    for op in KERNELS:
        sample = OPERATIONS[op].samples(workload(hidden=hidden, ffn_width=hidden, tokens=4), generator)[0]
        for value, expected in zip(
            outcome(KERNELS[op], sample, control=False),
            outcome(OPERATIONS[op].reference, sample, control=True),
            strict=True,
        ):
            assert OPERATIONS[op].tolerance(sample).needed(value, expected) <= 1


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
    offered = CudaOperations().implementations()
    for implementation in TRITON:
        assert next(i for i in offered if i.op == implementation.op) is implementation
        assert implementation.supports(workload()) is None
        assert "float32" in implementation.supports(workload(torch.float64))
