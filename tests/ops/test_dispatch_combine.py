"""dispatch and combine, every implementation, against loops over tokens and by finite differences."""

import random

import pytest
import torch

from portmoe.backends.cpu import bag_dispatch, compiler
from portmoe.backends.cpu import dispatch as compiled_dispatch
from portmoe.backends.torch import ops as torch_ops
from portmoe.ops import combine, dispatch

DISPATCHES = {
    "reference": dispatch,
    "gather": torch_ops.DISPATCH_GATHER.function,
    "bag": bag_dispatch.bag_dispatch,
}
WIDE = list(DISPATCHES)  # those that compute float64 too
COMBINES = {
    "reference": combine,
    "gather": torch_ops.COMBINE_GATHER.function,
    "bag": bag_dispatch.bag_combine,
}
if not isinstance(compiler.kernels(), str):
    DISPATCHES["compiled"] = compiled_dispatch.dispatch
    COMBINES["compiled"] = compiled_dispatch.combine


def random_rows(seed):
    """Distinct rows for some of the K·S choices, the others dropped, spelled as any row ≥ R."""
    r = random.Random(seed)
    tokens, choices, hidden = r.choice([0, 1, 2, 5, 16]), r.choice([1, 2, 3]), r.choice([1, 3, 8])
    rows = r.choice([0, 1, 4, tokens * choices, tokens * choices + 5])
    taken = r.sample(range(rows), r.randint(0, min(rows, tokens * choices)))
    flat = taken + [rows + r.choice([0, 0, 1, 7]) for _ in range(tokens * choices - len(taken))]
    r.shuffle(flat)
    row_KS = torch.tensor(flat, dtype=torch.int64).view(choices, tokens)
    return row_KS, rows, hidden, torch.Generator().manual_seed(seed)


def choices_by_row(row_KS, rows):
    """{row: (k, s)} for the choices that are kept."""
    return {row: (k, s) for k, of_k in enumerate(row_KS.tolist()) for s, row in enumerate(of_k) if row < rows}


@pytest.mark.parametrize("function", DISPATCHES.values(), ids=DISPATCHES)
def test_dispatch_equals_the_loop(function):
    for seed in range(1000):
        row_KS, rows, hidden, generator = random_rows(seed)
        x_SH = torch.randn(row_KS.shape[1], hidden, generator=generator, requires_grad=True)
        grad_RH = torch.randn(rows, hidden, generator=generator)
        expected, expected_grad = torch.zeros(rows, hidden), torch.zeros(x_SH.shape, dtype=torch.float64)
        for row, (_, s) in choices_by_row(row_KS, rows).items():
            expected[row] = x_SH[s].detach()
            expected_grad[s] += grad_RH[row]
        out_RH = function(x_SH, row_KS, rows)
        assert torch.equal(out_RH, expected)
        (ours,) = torch.autograd.grad(out_RH, x_SH, grad_RH)
        torch.testing.assert_close(ours.double(), expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", COMBINES.values(), ids=COMBINES)
def test_combine_equals_the_loop_and_never_reads_a_row_without_a_token(function):
    for seed in range(1000):
        row_KS, rows, hidden, generator = random_rows(seed)
        mine = choices_by_row(row_KS, rows)
        y_RH = torch.randn(rows, hidden, generator=generator)
        for row in set(range(rows)) - set(mine):
            y_RH[row] = random.Random(row).choice([float("nan"), float("inf")])
        y_RH.requires_grad_()
        # Dropped choices keep a weight here on purpose: it must not matter.
        weight_KS = torch.rand(row_KS.shape, generator=generator, requires_grad=True)
        grad_SH = torch.randn(row_KS.shape[1], hidden, generator=generator)

        y, weight, grad = y_RH.detach().double(), weight_KS.detach().double(), grad_SH.double()
        expected = torch.zeros(grad_SH.shape, dtype=torch.float64)
        grad_y, grad_weight = torch.zeros_like(y), torch.zeros_like(weight)
        for row, (k, s) in mine.items():
            expected[s] += weight[k, s] * y[row]
            grad_y[row] = weight[k, s] * grad[s]
            grad_weight[k, s] = y[row] @ grad[s]

        out_SH = function(y_RH, row_KS, weight_KS)
        torch.testing.assert_close(out_SH.double(), expected, rtol=1e-5, atol=1e-5)
        ours_y, ours_weight = torch.autograd.grad(out_SH, (y_RH, weight_KS), grad_SH)
        torch.testing.assert_close(ours_y.double(), grad_y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours_weight.double(), grad_weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WIDE)
def test_finite_differences(name):
    for seed in range(30):
        row_KS, rows, hidden, generator = random_rows(seed)
        x_SH = torch.randn(row_KS.shape[1], hidden, generator=generator, dtype=torch.float64)
        y_RH = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
        weight_KS = torch.rand(row_KS.shape, generator=generator, dtype=torch.float64)
        if x_SH.numel() and y_RH.numel():
            assert torch.autograd.gradcheck(
                lambda x, f=DISPATCHES[name], i=row_KS, n=rows: f(x, i, n), x_SH.requires_grad_()
            )
            assert torch.autograd.gradcheck(
                lambda y, w, f=COMBINES[name], i=row_KS: f(y, i, w),
                (y_RH.requires_grad_(), weight_KS.requires_grad_()),
            )


@pytest.mark.parametrize("function", COMBINES.values(), ids=COMBINES)
def test_combine_sums_in_float32_and_rounds_once(function):
    # In bfloat16 1 + 2⁻⁸ rounds back to 1, so adding the two small terms one by one would lose both.
    y_RH = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    row_KS = torch.tensor([[0], [1], [2]])
    out_SH = function(y_RH, row_KS, torch.ones(3, 1))
    assert out_SH.dtype == torch.bfloat16
    assert out_SH.item() == 1 + 2.0**-7


@pytest.mark.parametrize("function", DISPATCHES.values(), ids=DISPATCHES)
def test_dispatch_leaves_nan_of_one_token_in_its_own_rows(function):
    x_SH = torch.tensor([[1.0], [float("nan")]])
    out_RH = function(x_SH, torch.tensor([[0, 9], [2, 3]]), 5)
    assert out_RH.isnan().flatten().tolist() == [False, False, False, True, False]
    assert out_RH[[1, 4]].eq(0).all()


@pytest.mark.parametrize("function", COMBINES.values(), ids=COMBINES)
def test_combine_does_not_round_the_weights_to_the_rows_type(function):
    # 1 + 2⁻⁹ is 1 in bfloat16; times 256 the difference is half a unit in the last place of 256 and of 257.
    y_RH = torch.tensor([[256.0], [-255.0]], dtype=torch.bfloat16, requires_grad=True)
    weight_KS = torch.tensor([[1 + 2.0**-9], [1.0]])
    out_SH = function(y_RH, torch.tensor([[0], [1]]), weight_KS)
    assert out_SH.item() == 1.5
    grad_RH = torch.autograd.grad(out_SH, y_RH, torch.tensor([[255.0]], dtype=torch.bfloat16))[0]
    assert grad_RH.flatten().tolist() == [255.0, 255.0]  # 255.498 rounded once


@pytest.mark.parametrize("function", COMBINES.values(), ids=COMBINES)
def test_the_weights_gradient_is_summed_and_kept_in_float32(function):
    y_RH = torch.ones(1, 300, dtype=torch.bfloat16)
    weight_KS = torch.ones(1, 1, requires_grad=True)
    out_SH = function(y_RH, torch.tensor([[0]]), weight_KS)
    grad_SH = torch.ones(1, 300, dtype=torch.bfloat16)
    grad_SH[0, 0] = 2.0
    (grad_KS,) = torch.autograd.grad(out_SH, weight_KS, grad_SH)
    assert grad_KS.item() == 301.0  # no bfloat16 number
