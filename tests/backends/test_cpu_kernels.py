"""The compiled kernels between the experts' products against float64, and what happens without a compiler."""

import _ctypes
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from agreement import workload

from portmoe.backends.cpu import attention as compiled_attention
from portmoe.backends.cpu import compiler
from portmoe.backends.cpu import expert_ffn as compiled_expert_ffn
from portmoe.backends.cpu import router as compiled_router
from portmoe.backends.cpu import rows as compiled_rows
from portmoe.ops import Segments

needs_compiler = pytest.mark.skipif(isinstance(compiler.kernels(), str), reason=str(compiler.kernels()))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_kernels(monkeypatch, tmp_path):
    """``native`` as a new process finds it, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.kernels.cache_clear()
    yield tmp_path
    compiler.kernels.cache_clear()


@needs_compiler
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("offsets", [(0, 1, 64, 128, 193, 194, 330), (0, 330)], ids=["packed", "one"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_attention_over_several_squares(offsets, dtype, tolerance):
    """Of heads that lie apart and share keys, with the gradient of log Σ exp, against torch's in float64."""
    generator, tokens, scale = torch.Generator().manual_seed(0), offsets[-1], 0.2
    wide = torch.randn(tokens, 4, 24 + 24 + 20, generator=generator).to(dtype)
    q, k, v = wide.split((24, 24, 20), -1)
    leaves = [t.requires_grad_() for t in (q.detach(), k.detach()[:, :2], v.detach()[:, 1:3])]
    out, log_sum = compiled_attention.compiled(*leaves, Segments(offsets), scale, log_sum=True)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    outs, sums = [], []
    for start, end in pairwise(offsets):
        q, k, v = (t[start:end].transpose(0, 1) for t in doubles)
        k, v = (t.repeat_interleave(2, 0) for t in (k, v))
        outs.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
        hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        sums.append((q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf).logsumexp(-1))
    expected = [torch.cat(parts, 1).transpose(0, 1) for parts in (outs, sums)]
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (out, log_sum)]
    found = torch.autograd.grad((out, log_sum), leaves, grads)
    right = torch.autograd.grad(expected, doubles, [grad.double() for grad in grads])
    for a, b in zip((out, log_sum, *found), (*expected, *right), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@needs_compiler
def test_attention_is_left_to_torch_where_torch_is_quicker(monkeypatch):
    supports = compiled_attention.ALL[0].supports
    long = {"dtype": torch.bfloat16, "head_dim": 64, "seq_len": 2048, "tokens": 4096, "equal_segments": True}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert "torch's kernel is quicker" in supports(workload(**long))
    for changes in ({"dtype": torch.float32}, {"head_dim": 48}, {"seq_len": 512}, {"equal_segments": False}):
        assert supports(workload(**long | changes)) is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "vectors of 512 bits" in supports(workload())


@needs_compiler
def test_attention_passes_on_what_is_no_number():
    q, k, v = (torch.randn(70, 1, 8) for _ in range(3))
    q[66] = torch.nan
    out = compiled_attention.compiled(q, k, v, Segments((0, 70)), 0.3)
    assert out.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [66]


def drawn(rows, width, dtype, seed):
    """Mostly ordinary numbers, and some at which exp over- or underflows."""
    t_PF = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).mul_(3)
    t_PF.view(-1)[:: max(1, t_PF.numel() // 7)] = torch.tensor(150.0 if seed % 2 else -150.0)
    return t_PF.to(dtype)


@needs_compiler
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (32, 32), (64, 96), (33, 31), (70, 130), (128, 8)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_kernels_against_float64(rows, width, dtype, rtol):
    gate, up, grad = (drawn(rows, width, dtype, seed) for seed in (1, 2, 3))
    wide = [t.double().requires_grad_() for t in (gate, up)]
    expected = wide[0] / (1 + torch.exp(-wide[0])) * wide[1]
    grad_gate, grad_up = torch.autograd.grad(expected, wide, grad.double())
    kernels = compiled_expert_ffn.Kernels()
    hidden, again, up_gradient = (torch.full_like(gate, torch.nan) for _ in range(3))

    kernels.forward(gate, up, hidden)
    transposed = kernels.backward(gate, up, again, grad, up_gradient)

    pairs = [
        (hidden, expected),
        (again, expected),
        (grad, grad_gate),
        (up_gradient, grad_up),
        (kernels.transpose(gate).t(), gate.double()),
    ]
    if dtype == torch.bfloat16:
        pairs.append((transposed.t(), torch.cat((grad_gate, grad_up), dim=1)))
    for ours, theirs in pairs:
        # s·(1 + g·(1 − s)) cancels near its zero: judged by the scale of its factors
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=rtol * 10)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_are_not_swallowed(dtype):
    gate, up = (torch.ones(40, 40, dtype=dtype) for _ in range(2))
    gate[0, 0], gate[1, 1], up[2, 2] = torch.nan, torch.inf, torch.nan
    hidden, grad, grad_up = (torch.ones_like(gate) for _ in range(3))
    compiled_expert_ffn.Kernels().forward(gate, up, hidden)
    assert hidden[0, 0].isnan()
    assert hidden[1, 1] == torch.inf
    assert hidden[2, 2].isnan()
    assert hidden.isnan().sum() == 2
    compiled_expert_ffn.Kernels().backward(gate, up, hidden, grad, grad_up)
    assert grad[0, 0].isnan()
    assert grad[2, 2].isnan()
    assert grad_up[0, 0].isnan()


@needs_compiler
def test_the_library_is_compiled_once(fresh_kernels):
    assert not isinstance(compiler.kernels(), str)
    (library,) = (fresh_kernels / "portmoe").iterdir()
    made = library.stat().st_mtime_ns
    compiler.kernels.cache_clear()
    assert not isinstance(compiler.kernels(), str)
    assert [file.stat().st_mtime_ns for file in (fresh_kernels / "portmoe").iterdir()] == [made]


@pytest.mark.usefixtures("fresh_kernels")
def test_without_a_compiler_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    assert all("no C compiler" in i.supports(workload()) for i in compiled_expert_ffn.ALL)


@pytest.fixture
def _homeless(monkeypatch):
    """No HOME and no entry in the password database, as in a container started under any user id."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    compiler.kernels.cache_clear()
    yield
    compiler.kernels.cache_clear()


@needs_compiler
@pytest.mark.usefixtures("_homeless")
@pytest.mark.parametrize("variables", [{}, {"HOME": "relative"}, {"XDG_CACHE_HOME": "relative"}])
def test_without_a_home_directory_the_reason_is_told(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert all("set XDG_CACHE_HOME or HOME" in i.supports(workload()) for i in compiled_expert_ffn.ALL)


@needs_compiler
@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize("trouble", [RuntimeError, ValueError, KeyError, OSError, UnicodeError])
def test_whatever_a_cache_raises_is_a_reason(monkeypatch, trouble):
    def raises(*_):
        raise trouble("trouble")

    monkeypatch.setattr(compiler, "_compile", raises)
    assert all("trouble" in i.supports(workload()) for i in compiled_expert_ffn.ALL)


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"no library", None])
def test_a_broken_library_is_made_anew(fresh_kernels, content):
    """None: another library, without these functions."""
    assert not isinstance(compiler.kernels(), str)
    (library,) = (fresh_kernels / "portmoe").iterdir()
    library.unlink()  # the file may be mapped into this process
    library.write_bytes(Path(_ctypes.__file__).read_bytes() if content is None else content)
    compiler.kernels.cache_clear()
    assert not isinstance(compiler.kernels(), str)


@needs_compiler
@pytest.mark.usefixtures("fresh_kernels")
def test_what_does_not_compile_is_told_with_the_compilers_words(monkeypatch, tmp_path):
    (tmp_path / "broken.c").write_text("#error no such luck")
    monkeypatch.setattr(compiler, "FOLDER", tmp_path)
    assert all("no such luck" in i.supports(workload()) for i in compiled_expert_ffn.ALL)


def test_other_types_are_left_to_others():
    reasons = [i.supports(workload(torch.float16)) for i in compiled_expert_ffn.ALL]
    assert all("torch.float16" in reason for reason in reasons)


@needs_compiler
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 70), (5, 32), (33, 100)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_rms_norm_by_two_threads_against_float64(rows, width, dtype, rtol):
    generator = torch.Generator().manual_seed(rows)
    x_TH, grad_TH = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    weight_H = torch.randn(width, generator=generator).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x_TH, weight_H)]
    wide = [t.double().requires_grad_() for t in (x_TH, weight_H)]
    expected = wide[0] / (wide[0].square().mean(1, keepdim=True) + 1e-5).sqrt() * wide[1]
    ours = compiled_rows.rms_norm(*leaves, 1e-5)
    torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=rtol)
    grads = torch.autograd.grad(ours, leaves, grad_TH)
    for grad, control in zip(grads, torch.autograd.grad(expected, wide, grad_TH.double()), strict=True):
        torch.testing.assert_close(grad.double(), control, rtol=rtol, atol=rtol * 10)


@needs_compiler
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_rotary_of_heads_that_lie_apart_is_a_complex_product(interleaved, dtype, rtol):
    tokens, heads, pairs = 7, 3, 5
    qkv_TN3D = torch.randn(tokens, heads, 3, 2 * pairs, generator=torch.Generator().manual_seed(1)).to(dtype)
    leaf_TND = qkv_TN3D[:, :, 1].requires_grad_()
    angle_TR = torch.rand(tokens, pairs, generator=torch.Generator().manual_seed(2)) * 50
    wide_TND = leaf_TND.detach().double()
    split = (wide_TND[..., 0::2], wide_TND[..., 1::2]) if interleaved else wide_TND.chunk(2, -1)
    turn = torch.polar(torch.ones(tokens, 1, pairs).double(), angle_TR.double()[:, None])

    def joined(number_TNR):
        parts = (number_TNR.real, number_TNR.imag)
        return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)

    ours_TND = compiled_rows.rotary(leaf_TND, angle_TR.cos(), angle_TR.sin(), interleaved)
    torch.testing.assert_close(
        ours_TND.double(), joined(torch.complex(*split) * turn), rtol=rtol, atol=rtol * 10
    )
    (grad_TND,) = torch.autograd.grad(ours_TND, leaf_TND, leaf_TND.detach())
    torch.testing.assert_close(
        grad_TND.double(), joined(torch.complex(*split) * turn.conj()), rtol=rtol, atol=rtol * 10
    )


def test_a_tensor_without_memory_of_its_own_is_refused():
    """As the result of a functional collective is, which another process is still to fill."""

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        __torch_dispatch__ = None

    with pytest.raises(TypeError, match="memory of their own, not a Wrapper"):
        compiler.addresses(torch.ones(2), Wrapper(torch.ones(3)))


@needs_compiler
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("tokens", "experts", "width"), [(1, 1, 1), (0, 2, 8), (5, 3, 70), (33, 16, 130)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_router_by_two_threads_against_float64(tokens, experts, width, dtype, rtol):
    generator = torch.Generator().manual_seed(tokens)
    x_SH = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight_EH = torch.randn(experts, width, generator=generator).requires_grad_()
    grad_SE = torch.randn(tokens, experts, generator=generator)
    wide = [t.detach().double().requires_grad_() for t in (x_SH, weight_EH)]
    expected_SE = wide[0] @ wide[1].t()
    logits_SE = compiled_router.router(x_SH, weight_EH)
    grads = torch.autograd.grad(logits_SE, (x_SH, weight_EH), grad_SE)
    controls = torch.autograd.grad(expected_SE, wide, grad_SE.double())
    for ours, control, share in (
        (logits_SE, expected_SE, 2e-6),  # exact products of what may be bfloat16
        (grads[0], controls[0], rtol),
        (grads[1], controls[1], 2e-6),
    ):
        torch.testing.assert_close(ours.double(), control, rtol=share, atol=share * 10)


@needs_compiler
def test_many_experts_are_left_to_a_matrix_product():
    (implementation,) = compiled_router.ALL
    assert implementation.supports(workload()) is None
    assert "17 experts" in implementation.supports(workload(experts=17))
