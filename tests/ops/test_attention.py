"""Attention, every implementation, against one query at a time in float64."""

import math
from itertools import pairwise

import pytest
import torch

from portmoe.backends.torch import ops as torch_ops
from portmoe.ops import Segments, attention

FUNCTIONS = {"reference": attention, "sdpa": torch_ops.ATTENTION_SDPA.function}
OFFSETS = [(0, 1), (0, 12), (0, 4, 8, 12), (0, 1, 2, 3), (0, 1, 4, 11, 12), (0, 5, 10, 13), (0, 2, 9, 11, 18)]


def query_by_query(q, k, v, offsets, scale):
    out = torch.zeros_like(q)
    for start, end in pairwise(offsets):
        for t in range(start, end):
            for n in range(q.shape[1]):
                scores = k[start : t + 1, n] @ q[t, n] * scale
                powers = (scores - scores.max()).exp()
                out[t, n] = (powers / powers.sum()) @ v[start : t + 1, n]
    return out


def inputs(tokens, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 2, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_forward_and_gradients(function, offsets, dtype, tolerance):
    leaves = inputs(offsets[-1], dtype)
    scale = 1 / math.sqrt(8)
    out = function(*leaves, Segments(offsets), scale)
    assert (out.dtype, out.shape) == (dtype, leaves[0].shape)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = query_by_query(*doubles, offsets, scale)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(expected, doubles, grad.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_scale_is_the_one_given(function):
    leaves = inputs(6, torch.float32)
    out = function(*leaves, Segments((0, 6)), 1e-9)  # every visible token weighs the same
    count = torch.arange(1, 7).view(6, 1, 1)
    torch.testing.assert_close(out, leaves[2].cumsum(0) / count)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("offsets", [(0, 5), (0, 2, 5), (0,), (0, 9)], ids=str)
def test_segments_must_cover_the_tokens(function, offsets):
    with pytest.raises(ValueError, match="6"):
        function(*inputs(6, torch.float32), Segments(offsets), 1.0)


def test_segments():
    assert Segments((0, 4, 8)).equal_length == 4
    assert Segments((0, 4, 9)).equal_length is None
    assert Segments((0, 4, 9)).lengths == (4, 5)
    assert Segments((0, 4, 9)).total == 9
    assert (Segments((0,)).total, Segments((0,)).equal_length) == (0, None)
    for wrong in [(), (1, 4), (0, 4, 4), (0, 4, 3)]:
        with pytest.raises(ValueError, match="rise strictly"):
            Segments(wrong)
