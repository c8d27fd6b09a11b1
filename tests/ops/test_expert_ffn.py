"""expert_ffn and expert_ffn_ragged, every implementation, against one matrix at a time in float64."""

import pytest
import torch
from agreement import workload

from portmoe.backends.cpu import buffered_expert_ffn, compiler
from portmoe.backends.cpu import expert_ffn as compiled_expert_ffn
from portmoe.backends.cpu.products import direct_products
from portmoe.backends.torch import ops as torch_ops
from portmoe.ops import expert_ffn, expert_ffn_ragged

FOR_CPUS = {(i.op, i.name): i.function for i in buffered_expert_ffn.ALL}
if not isinstance(compiler.kernels(), str):
    FOR_CPUS |= {(i.op, i.name): i.function for i in compiled_expert_ffn.ALL}
STATIC = {
    "reference": expert_ffn,
    "loop": torch_ops.EXPERT_FFN_LOOP.function,
    **{name: function for (op, name), function in FOR_CPUS.items() if op == "expert_ffn"},
}
RAGGED = {
    "reference": expert_ffn_ragged,
    "loop": torch_ops.EXPERT_FFN_RAGGED_LOOP.function,
    "grouped_mm": torch_ops.EXPERT_FFN_GROUPED_MM.function,
    **{name: function for (op, name), function in FOR_CPUS.items() if op == "expert_ffn_ragged"},
}


def weights(experts, dtype=torch.float32):
    generator = torch.Generator().manual_seed(experts)
    shapes = [(experts, 24, 16), (experts, 24, 16), (experts, 16, 24)]
    return [torch.randn(s, generator=generator).div(4).to(dtype).requires_grad_() for s in shapes]


def one_by_one(rows, experts_of_rows, w1, w3, w2):
    """The definition, row by row in float64."""
    out = []
    for x, e in zip(rows, experts_of_rows, strict=True):
        gate, up = w1[e] @ x, w3[e] @ x
        out.append(w2[e] @ (gate / (1 + torch.exp(-gate)) * up))
    return torch.stack(out) if out else rows


def compare(function, x, leaves, expected_of, rtol):
    """Forward and every gradient of ``function()`` against the float64 control."""
    out = function()
    controls = [t.detach().double().requires_grad_() for t in (x, *leaves)]
    expected = expected_of(*controls)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    assert out.dtype == x.dtype
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=rtol)
    ours = torch.autograd.grad(out, (x, *leaves), grad)
    if expected.requires_grad:
        theirs = torch.autograd.grad(expected, controls, grad.double(), materialize_grads=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("function", STATIC.values(), ids=STATIC)
@pytest.mark.parametrize(("experts", "capacity"), [(1, 1), (3, 5), (4, 0)])
def test_static(function, experts, capacity):
    leaves = weights(experts)
    x_ECH = torch.randn(experts, capacity, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    owner = [e for e in range(experts) for _ in range(capacity)]
    out = function(x_ECH, *leaves)
    assert out.shape == x_ECH.shape
    compare(
        lambda: function(x_ECH, *leaves),
        x_ECH,
        leaves,
        lambda x, *w: one_by_one(x.flatten(0, 1), owner, *w).view(x.shape),
        1e-5,
    )


@pytest.mark.parametrize("function", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize(
    "lengths", [[5], [0, 3, 0, 4], [7, 0, 0], [0, 0, 9], [0, 0], [1, 2, 3], [65, 0, 64, 70]]
)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_ragged(function, lengths, dtype, rtol):
    leaves = weights(len(lengths), dtype)
    rows = sum(lengths)
    x_RH = torch.randn(rows, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    owner = [e for e, n in enumerate(lengths) for _ in range(n)]
    ends_E = torch.tensor(lengths).cumsum(0)
    compare(
        lambda: function(x_RH, ends_E, *leaves),
        x_RH,
        leaves,
        lambda x, *w: one_by_one(x, owner, *w),
        rtol,
    )


@pytest.mark.parametrize("function", RAGGED.values(), ids=RAGGED)
def test_an_expert_without_rows_gets_a_zero_gradient_also_from_an_expanded_one(function):
    leaves = weights(3)
    out = function(torch.randn(4, 16), torch.tensor([2, 2, 4]), *leaves)
    out.sum().backward()  # hands down a gradient with stride 0
    for leaf in leaves:
        assert (leaf.grad[1] == 0).all()
        assert (leaf.grad[[0, 2]] != 0).any()


@pytest.mark.parametrize("function", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_nan_in_the_rows_of_one_expert_stays_with_it(function, where):
    leaves = weights(3, torch.bfloat16)
    x_RH, grad_RH = torch.ones(2, 9, 16, dtype=torch.bfloat16)
    {"input": x_RH, "gradient": grad_RH}[where][3:5] = torch.nan
    y_RH = function(x_RH.requires_grad_(), torch.tensor([3, 5, 9]), *leaves)
    grads = torch.autograd.grad(y_RH, (x_RH, *leaves), grad_RH)
    if where == "input":
        assert y_RH.isnan().any(dim=1).tolist() == [False] * 3 + [True] * 2 + [False] * 4
    assert grads[0].isnan().any(dim=1).tolist() == [False] * 3 + [True] * 2 + [False] * 4
    for grad in grads[1:]:
        assert grad.flatten(1).isnan().any(dim=1).tolist() == [False, True, False]


def test_in_16_bit_types_every_product_is_over_a_multiple_of_the_granule():
    counts = set()

    def recording(out_MN, *pairs):
        counts.update(n for a_MK, _ in pairs for n in a_MK.shape)
        direct_products(out_MN, *pairs)

    ragged = buffered_expert_ffn.ragged(recording, 32)
    for lengths, dtype in (([1, 33, 0, 64], torch.bfloat16), ([5, 31, 2, 32], torch.float16)):
        x_RH = torch.ones(sum(lengths), 16, dtype=dtype, requires_grad=True)
        ragged(x_RH, torch.tensor(lengths).cumsum(0), *weights(4, dtype)).sum().backward()
    assert counts == {32, 64, 16, 24}  # rounded rows, H and F
    counts.clear()
    x_RH = torch.ones(3, 16, requires_grad=True)
    ragged(x_RH, torch.tensor([1, 3, 3, 3]), *weights(4)).sum().backward()
    assert counts == {1, 2, 16, 24}  # float32 needs no rounding


def test_grouped_mm_says_which_shapes_it_cannot_take():
    def supports(**changes):
        shapes = workload(**({"dtype": torch.bfloat16} | changes))
        return torch_ops.EXPERT_FFN_GROUPED_MM.supports(shapes)

    assert supports() is None
    assert "ffn_width is 20" in supports(ffn_width=20)
    assert "hidden is 2" in supports(hidden=2)
    assert "float64" in supports(dtype=torch.float64)
