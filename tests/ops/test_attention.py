"""Attention, every implementation, against one query at a time in float64."""

import math
from itertools import pairwise

import pytest
import torch
from agreement import workload

from portmoe.backends.cpu import compiler
from portmoe.backends.cpu.attention import ALL as OF_THE_CPU
from portmoe.backends.torch import attention_blocks
from portmoe.backends.torch import ops as torch_ops
from portmoe.config import Config
from portmoe.families.internlm_moe.section import ModelConfig
from portmoe.ops import OPERATIONS, Implementation, Segments, attention, choose

COMPILED, FLASH = OF_THE_CPU
FUNCTIONS = {
    "reference": attention,
    "sdpa": torch_ops.ATTENTION_SDPA.function,
    "flash": FLASH.function,
    "blocks": torch_ops.ATTENTION_BLOCKS.function,
}
if not isinstance(compiler.kernels(), str):
    FUNCTIONS["compiled"] = COMPILED.function
WITH_LOG_SUM = {name: function for name, function in FUNCTIONS.items() if name != "sdpa"}
OFFSETS = [(0, 1), (0, 12), (0, 4, 8, 12), (0, 1, 2, 3), (0, 1, 4, 11, 12), (0, 5, 10, 13), (0, 2, 9, 11, 18)]


def query_by_query(q, k, v, offsets, scale):
    return both_query_by_query(q, k, v, offsets, scale)[0]


def both_query_by_query(q, k, v, offsets, scale):
    """The result and the logarithm of the sum of exponentials."""
    out, log_sum, shared = (
        q.new_zeros(*q.shape[:2], v.shape[2]),
        q.new_zeros(q.shape[:2]),
        q.shape[1] // k.shape[1],
    )
    for start, end in pairwise(offsets):
        for t in range(start, end):
            for n in range(q.shape[1]):
                scores = k[start : t + 1, n // shared] @ q[t, n] * scale
                powers = (scores - scores.max()).exp()
                out[t, n] = (powers / powers.sum()) @ v[start : t + 1, n // shared]
                log_sum[t, n] = powers.sum().log() + scores.max()
    return out, log_sum


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
@pytest.mark.parametrize("offsets", [(0, 4, 8, 12), (0, 1, 4, 11, 12), (0,)], ids=str)
@pytest.mark.parametrize("widths", [(8, 8), (8, 5), (8, 11)], ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2), (4, 1)])
def test_grouped_heads_and_values_of_another_width(function, offsets, widths, heads, groups):
    generator, tokens = torch.Generator().manual_seed(heads), offsets[-1]
    shapes = (heads, widths[0]), (groups, widths[0]), (groups, widths[1])
    leaves = [torch.randn(tokens, *shape, generator=generator).requires_grad_() for shape in shapes]
    out = function(*leaves, Segments(offsets), 0.3)
    assert out.shape == (tokens, heads, widths[1])
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = query_by_query(*doubles, offsets, 0.3) if tokens else out.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    if tokens:
        grad = torch.randn(out.shape, generator=generator)
        ours = torch.autograd.grad(out, leaves, grad)
        for a, b in zip(ours, torch.autograd.grad(expected, doubles, grad.double()), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", WITH_LOG_SUM.values(), ids=WITH_LOG_SUM)
@pytest.mark.parametrize("offsets", [(0, 12), (0, 4, 8, 12), (0, 1, 4, 11, 12)], ids=str)
@pytest.mark.parametrize("sizes", [(2, 2, 8), (6, 2, 5), (4, 1, 11)], ids=str)
def test_the_logarithm_of_the_sum_and_its_gradients(function, offsets, sizes, monkeypatch):
    monkeypatch.setattr(attention_blocks, "BLOCK", 3)  # several, and a last one that is shorter
    (heads, groups, width), generator = sizes, torch.Generator().manual_seed(0)
    shapes = (heads, 8), (groups, 8), (groups, width)
    leaves = [torch.randn(12, *shape, generator=generator).requires_grad_() for shape in shapes]
    out, log_sum_TN = function(*leaves, Segments(offsets), 0.3, log_sum=True)
    assert (log_sum_TN.dtype, log_sum_TN.shape) == (torch.float32, (12, heads))
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    theirs = both_query_by_query(*doubles, offsets, 0.3)
    for value, expected in zip((out, log_sum_TN), theirs, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    weights = [torch.randn(t.shape, generator=generator) for t in (out, log_sum_TN)]
    ours = torch.autograd.grad((out, log_sum_TN), leaves, weights)
    for a, b in zip(ours, torch.autograd.grad(theirs, doubles, [t.double() for t in weights]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_what_an_implementation_does_not_take_is_computed_by_the_reference():
    operations = {"attention": OPERATIONS["attention"]}
    with_log_sum = choose(operations, [torch_ops.ATTENTION_SDPA, FLASH], workload(log_sum=True), Config())
    assert with_log_sum.record()["attention"]["chosen"] == "flash"
    offered = [torch_ops.ATTENTION_SDPA, Implementation("attention", "of_today", print)]
    for changes, chosen, lacking in (
        ({"heads": 4, "kv_heads": 2}, "sdpa", "it does not take fewer heads of k and v than of q"),
        ({"value_dim": 12}, "sdpa", "it does not take values of another width than keys"),
        ({"log_sum": True}, "reference", "it does not take the logarithm of the softmax's sum as a result"),
    ):
        record = choose(
            operations, offered, workload(**changes), Config(model=ModelConfig(use_flash_attn=True))
        ).record()["attention"]
        assert record["chosen"] == chosen
        assert record["candidates"][1]["reason"] == lacking


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
