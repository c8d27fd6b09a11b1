"""Optional packages as implementations, by stand-ins; kernels/ runs what of them can run here."""

import inspect
import sys

import pytest
import standins
import torch
from agreement import assert_agrees, workload
from torch.nn.attention import varlen as torch_varlen

from portmoe import load_config
from portmoe.backends.cuda import attention as flash
from portmoe.backends.cuda import tutel, varlen
from portmoe.backends.cuda.ops import CudaOperations
from portmoe.backends.triton import liger
from portmoe.backends.xpu.ops import XpuOperations
from portmoe.ops import OPERATIONS, Segments, choose
from portmoe.ops import attention as plain_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ({}, {"capacity": 0}, {"tokens": 7, "seq_len": 3, "equal_segments": False, "capacity": 4})


@pytest.fixture
def tutel_standin(monkeypatch):
    standins.install(
        monkeypatch,
        "tutel.moe",
        fast_cumsum_sub_one=standins.fast_cumsum_sub_one,
        fast_dispatcher=standins.FastDispatcher,
    )


@pytest.mark.parametrize("implementation", [tutel.GATING, tutel.DISPATCH, tutel.COMBINE], ids=lambda i: i.op)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tutel_computes_the_same(tutel_standin, implementation, dtype):
    for changes in SHAPES:
        shapes = workload(dtype, **changes)
        assert implementation.supports(shapes) is None
        assert_agrees(implementation.function, OPERATIONS[implementation.op], shapes)


def test_tutels_gating_routes_as_the_reference(tutel_standin):
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    ours, theirs = (f(logits, 2, 0.7, 1) for f in (tutel.topk_gating, OPERATIONS["topk_gating"].reference))
    assert torch.equal(ours.slot_KS, theirs.slot_KS)
    assert torch.equal(ours.count_E, theirs.count_E)
    assert ours.slot_KS.dtype == ours.count_E.dtype == torch.int64


def test_tutel_with_buffers_of_nothing(tutel_standin):
    x, rows = torch.randn(3, 4, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
    buffer = tutel.dispatch(x, rows, 0)
    assert buffer.shape == (0, 4)
    assert tutel.combine(buffer, rows, torch.ones(2, 3)).tolist() == torch.zeros(3, 4).tolist()
    assert tutel.topk_gating(torch.zeros(0, 4), 2, 1.0, 4).count_E.tolist() == [0] * 4


def test_what_tutel_does_not_take(monkeypatch, tutel_standin):
    assert "float32" in tutel.supports(workload(torch.float64))
    assert "int32" in tutel.supports(workload(tokens=2**20, hidden=4096))
    monkeypatch.delattr(sys.modules["tutel.moe"], "fast_dispatcher")
    assert tutel.supports(workload()) == "tutel.moe has no fast_dispatcher"
    monkeypatch.setitem(sys.modules, "tutel", None)
    assert "tutel does not load" in tutel.supports(workload())


def gating_record(*settings):
    log = []
    config = load_config("tiny_moe4", ["model.use_flash_attn=true", *settings])
    table = choose(OPERATIONS, CudaOperations().implementations(), workload(), config, log.append)
    return table.record()["topk_gating"], log


def test_tutel_is_asked_for_and_its_lack_recorded(monkeypatch, tutel_standin):
    record, log = gating_record("moe.use_tutel=true")
    assert record["chosen"] == "tutel"
    assert not any("moe.use_tutel" in line for line in log)
    monkeypatch.setitem(sys.modules, "tutel", None)
    record, log = gating_record("moe.use_tutel=true")
    assert record["chosen"] == "triton"
    assert "tutel does not load" in record["candidates"][0]["reason"]
    (line,) = (line for line in log if "moe.use_tutel" in line)
    assert "topk_gating.triton computes the same function instead" in line
    record, log = gating_record()
    assert record["candidates"][0]["reason"] == "not asked for: moe.use_tutel is false"


def test_ligers_norm_computes_the_same(monkeypatch):
    standins.install(
        monkeypatch, "liger_kernel.ops.rms_norm", LigerRMSNormFunction=standins.LigerRMSNormFunction
    )
    for dtype in DTYPES:
        assert_agrees(liger.rms_norm, OPERATIONS["rms_norm"], workload(dtype))
    assert liger.rms_norm(torch.zeros(0, 4), torch.ones(4), 1e-5).shape == (0, 4)


def test_what_liger_does_not_take(monkeypatch):
    monkeypatch.setattr(liger, "installed_version", {}.get)
    for implementation in (liger.RMS_NORM, liger.CROSS_ENTROPY):
        assert "float32" in implementation.supports(workload(torch.float64))
        assert implementation.supports(workload()) == "liger-kernel is not installed"
        assert implementation in CudaOperations().implementations()
        assert implementation in XpuOperations().implementations()
    assert "65538 numbers" in liger.RMS_NORM.supports(workload(hidden=65538))
    monkeypatch.setattr(liger, "installed_version", lambda _: "0.6.0")
    assert liger.CROSS_ENTROPY.supports(workload()) == "liger-kernel 0.6.0 is older than 0.8.5"
    monkeypatch.setattr(liger, "installed_version", lambda _: "0.8.5")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert "0.8.5 does not load" in liger.CROSS_ENTROPY.supports(workload())


REAL = inspect.signature(torch_varlen.varlen_attn)


def varlen_standin(*args, **kwargs):
    """torch's own signature and documented arguments; the reference inside."""
    given = REAL.bind(*args, **kwargs)
    given.apply_defaults()
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *_ = given.args
    assert cu_seq_q is cu_seq_k
    assert (cu_seq_q.dtype, cu_seq_q.device) == (torch.int32, query.device)
    assert given.arguments["window_size"] == (-1, 0)
    assert not given.arguments.get("enable_gqa", False)  # which torch 2.11 lacks
    segments = Segments(tuple(cu_seq_q.tolist()))
    assert max(segments.lengths) == max_q == max_k
    return plain_attention(query, key, value, segments, given.arguments["scale"])


varlen_standin.__signature__ = REAL


def test_varlen_computes_the_same(monkeypatch):
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_standin)
    for dtype in DTYPES:
        unequal = {"tokens": 7, "seq_len": 3, "equal_segments": False}
        for changes in (
            {},
            unequal,
            unequal | {"head_dim": 24, "value_dim": 16},
            unequal | {"value_dim": 24},
        ):
            assert_agrees(varlen.attention, OPERATIONS["attention"], workload(dtype, **changes))
    nothing = torch.zeros(0, 2, 8)
    assert varlen.attention(nothing, nothing, nothing, Segments((0,)), 1.0).shape == (0, 2, 8)


def test_varlen_is_called_as_this_torch_wants_it():
    """The real function on tensors without memory, which checks the arguments and their types."""
    segments = Segments((0, 1, 5))
    heads = torch.empty(5, 2, 8, dtype=torch.bfloat16, device="meta")
    assert varlen.attention(heads, heads, heads, segments, 0.3).shape == (5, 2, 8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"equal_segments": True}, "to sdpa"),
        ({"dtype": torch.float32}, "no torch.float32"),
        ({"head_dim": 264}, "264"),
        ({"head_dim": 12}, "multiples of 8"),
        ({"value_dim": 264}, "264"),
    ],
    ids=str,
)
def test_what_varlen_does_not_take(changes, reason):
    fitting = {"dtype": torch.bfloat16, "equal_segments": False}
    assert varlen.supports(workload(**fitting)) is None
    assert reason in varlen.supports(workload(**(fitting | changes)))


def flash_standins():
    """The two operations by their own schemas, and the kernel for hosts inside."""
    aten = torch.ops.aten
    schemas = [flash.FORWARD.default._schema, flash.BACKWARD.default._schema]

    def bound(schema, args, kwargs):
        names = [argument.name for argument in schema.arguments]
        return dict(zip(names, args, strict=False)) | kwargs

    def forward(*args, **kwargs):
        a = bound(schemas[0], args, kwargs)
        assert (a["dropout_p"], a["is_causal"], a["return_debug_mask"]) == (0.0, True, False)
        out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(
            a["query"], a["key"], a["value"], 0.0, True, scale=a["scale"]
        )
        return out, log_sum, "ends of q", "ends of k", 7, 8, "seed", "offset", None

    def backward(*args, **kwargs):
        a = bound(schemas[1], args, kwargs)
        assert (a["cum_seq_q"], a["cum_seq_k"], a["max_q"], a["max_k"]) == ("ends of q", "ends of k", 7, 8)
        assert (a["philox_seed"], a["philox_offset"], a["is_causal"]) == ("seed", "offset", True)
        assert a["query"].shape[-1] % 8 == 0
        tensors = (a[name] for name in ("grad_out", "query", "key", "value", "out", "logsumexp"))
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, a["dropout_p"], True, scale=a["scale"]
        )

    return forward, backward


def test_flash_computes_the_same_with_its_log_sum(monkeypatch):
    forward, backward = flash_standins()
    monkeypatch.setattr(flash, "FORWARD", forward)
    monkeypatch.setattr(flash, "BACKWARD", backward)
    unequal = {"tokens": 7, "seq_len": 3, "equal_segments": False}
    for dtype in DTYPES:
        for changes in (
            {},
            unequal,
            unequal | {"heads": 4, "kv_heads": 2},
            {"head_dim": 24, "value_dim": 16},
        ):
            shapes = workload(dtype, log_sum=True, **changes)
            assert_agrees(flash.ATTENTION_FLASH.function, OPERATIONS["attention"], shapes)


def test_flash_is_called_as_this_torch_wants_it():
    """The real operations on tensors without memory, which check the arguments and their types."""
    leaves = [torch.empty(5, 2, 8, dtype=torch.bfloat16, device="meta").requires_grad_() for _ in range(3)]
    segments = Segments((0, 1, 5))
    out, log_sum = flash.ATTENTION_FLASH.function(*leaves, segments, 0.3, log_sum=True)
    assert (out.shape, log_sum.shape, log_sum.dtype) == ((5, 2, 8), (5, 2), torch.float32)
    for gradient in torch.autograd.grad(out.float().sum() + log_sum.sum(), leaves):
        assert gradient.shape == (5, 2, 8)


def test_what_flash_does_not_take():
    fitting = {"dtype": torch.bfloat16, "log_sum": True}
    assert flash.supports(workload(**fitting)) is None
    for changes, reason in (
        ({"log_sum": False}, "a ring of ranks"),
        ({"dtype": torch.float32}, "no torch.float32"),
        ({"head_dim": 256}, "up to 248"),  # its backward pass needs columns to spare
    ):
        assert reason in flash.supports(workload(**(fitting | changes)))


def test_an_old_torchs_varlen_is_not_used(monkeypatch):
    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError

    monkeypatch.setattr(torch_varlen, "varlen_attn", old)
    shapes = workload(torch.bfloat16, equal_segments=False)
    assert "no scale and no window_size" in varlen.supports(shapes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_standin)
    shapes = workload(torch.bfloat16, torch.device("cuda", 0), equal_segments=False)
    assert "8.0 or newer" in varlen.supports(shapes)
