"""Every implementation of the NPU backend against its operation's reference in float64 on the CPU."""

import re

import agreement
import pytest
import torch
import torch_npu
from torch_npu import faults

from portmoe import load_config
from portmoe.backends.npu import attention, grouped_matmul, limits, permutation, signatures
from portmoe.backends.npu.ops import FUSED, LAST, UNUSED, NpuOperations
from portmoe.ops import OPERATIONS, Segments, choose
from portmoe.ops import attention as plain_attention
from portmoe.parallel.layout import Layout
from portmoe.parallel.workload import call_sites

NPU = torch.device("npu", 0)
IMPLEMENTATIONS = NpuOperations().implementations()


def workload(dtype=torch.float32, **changes):
    return agreement.workload(dtype, NPU, **changes)


CASES = [
    {},
    {"capacity": 0},
    {"tokens": 7, "seq_len": 3, "equal_segments": False, "capacity": 4},
    {"qk_interleaved": True, "experts": 1, "top_k": 1},
]
MORE = {
    "attention": [
        {"heads": 4, "kv_heads": 2},
        {"head_dim": 24, "value_dim": 16, "equal_segments": False},
        {"heads": 6, "kv_heads": 1, "head_dim": 12, "value_dim": 8},
        {"log_sum": True},
        {"heads": 4, "kv_heads": 2, "value_dim": 16, "equal_segments": False, "log_sum": True},
    ],
    "cross_entropy": [{"vocab": 130}, {"vocab": 128, "vocab_parts": 2}, {"vocab": 131, "vocab_parts": 3}],
}


@pytest.mark.parametrize(
    "implementation", (i for i in IMPLEMENTATIONS if i not in UNUSED), ids=lambda i: f"{i.op}.{i.name}"
)
def test_it_is_the_same_function(implementation):
    computed = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for changes in CASES + MORE.get(implementation.op, []):
            shapes = workload(dtype, **changes)
            operation = OPERATIONS[implementation.op]
            if operation.why_not(implementation, shapes) is None:
                agreement.assert_agrees(implementation.function, operation, shapes)
                computed += 1
    assert computed >= 3


def test_every_fused_function_is_preferred_where_it_supports_the_case():
    config = load_config("tiny_moe4", ["model.use_flash_attn=true"])
    for capacity in (12, 0):
        shapes = workload(capacity=capacity)
        record = choose(OPERATIONS, IMPLEMENTATIONS, shapes, config).record()
        first = {implementation.op: implementation.name for implementation in reversed(FUSED)}
        for op, name in first.items():
            if capacity and op in ("dispatch", "combine"):
                reason = record[op]["candidates"][0]["reason"]
                assert "static buffer drops some" in reason
            else:
                assert record[op]["chosen"] == name


@pytest.mark.parametrize(
    ("op", "at_most", "changes", "reason"),
    [
        ("attention", {"head_dim": 768}, {"head_dim": 769}, "over 768"),
        ("attention", {"heads": 256}, {"heads": 257}, "257 heads"),
        ("attention", {"heads": 6, "kv_heads": 3}, {"heads": 6, "kv_heads": 4}, "do not divide 6"),
        ("attention", {"value_dim": 8}, {"value_dim": 9}, "values are 9 wide"),
        ("attention", {"tokens": 2**20}, {"tokens": 2**20 + 1}, "tokens, over"),
        ("rotary", {"head_dim": 894}, {"head_dim": 896}, "below 896"),
        ("rotary", {"heads": 999}, {"heads": 1000}, "below 1000"),
        ("rotary", {"rotary_magnitude": 1.0}, {"rotary_magnitude": 1.1}, "in −1 … 1"),
        ("expert_ffn", {"experts": 1024}, {"experts": 1025}, "1025 experts"),
        ("expert_ffn_ragged", {"experts": 1024}, {"experts": 1025}, "1025 experts"),
        ("expert_ffn", {"ffn_width": 65535}, {"ffn_width": 65536}, "65536 wide"),
        ("dispatch", {"capacity": 0}, {"capacity": 0, "tokens": 2**23}, "over what it can sort"),
        ("dispatch", {"capacity": 0}, {"capacity": 0, "dropless": False}, "static buffer drops some"),
        ("combine", {"capacity": 0}, {"capacity": 0, "dropless": False}, "static buffer drops some"),
        ("swiglu", {}, {"dtype": torch.float64}, "float64"),
    ],
    ids=str,
)
def test_it_says_what_it_does_not_support(op, at_most, changes, reason):
    for implementation in (i for i in FUSED if i.op == op):
        assert implementation.supports(workload(**at_most)) is None
        assert reason in implementation.supports(workload(**changes))


def test_rotary_tables_that_yarn_enlarges_are_turned_by_something_else():
    plain = load_config("tiny_deepseek_v2", ["model.dtype=float32"])
    assert _chosen_rotary(plain) == {"npu_rotary_mul"}
    larger = load_config("tiny_deepseek_v2", ["model.dtype=float32", "model.rope_scaling.mscale_all_dim=0.0"])
    assert _chosen_rotary(larger) == {"reference"}


def _chosen_rotary(config):
    sites = call_sites(config, Layout.plan(config, 1), NPU)
    table = choose(OPERATIONS, IMPLEMENTATIONS, sites, config)
    return {choice.chosen for choice in table.choices if choice.key.startswith("rotary")}


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_older_pages_of_the_permutation_know_bfloat16_alone(op, monkeypatch):
    (implementation,) = (i for i in FUSED if i.op == op)
    monkeypatch.setattr(limits, "installed_version", lambda package: "2.11.0")
    for dtype in (torch.float32, torch.bfloat16):
        reason = implementation.supports(workload(dtype, capacity=0))
        known = op == "dispatch" and dtype == torch.bfloat16  # the weights of combine are float32
        assert reason is None if known else "bfloat16 alone" in reason


def test_on_an_a3_what_its_pages_leave_out_is_named_and_something_else_computes():
    config = load_config("tiny_moe4", ["model.use_flash_attn=true"])
    with faults.product("A3"):
        record = choose(OPERATIONS, IMPLEMENTATIONS, workload(capacity=0), config).record()
        chosen = {op: choice["chosen"] for op, choice in record.items()}
        assert chosen["attention"] == "npu_fusion_attention_v2"
        assert chosen["dispatch"] == "npu_moe_token_permute"
        assert chosen["swiglu"] == "silu"
        assert chosen["adamw"] == "fused"
        (first,) = [c for c in record["attention"]["candidates"] if c["name"] == "npu_fusion_attention"]
        assert "the page of npu_fusion_attention" in first["reason"]
        assert "lists A2, and Simulated Ascend910_9392" in first["reason"]
        for implementation in FUSED:
            if implementation.supports(workload(capacity=0)) is None:
                agreement.assert_agrees(
                    implementation.function, OPERATIONS[implementation.op], workload(capacity=0)
                )


def test_a_device_may_be_taken_for_another_product(monkeypatch):
    (swiglu,) = (i for i in FUSED if i.op == "swiglu")
    with faults.product("A3"):
        assert "PORTMOE_NPU_PRODUCT=A2" in swiglu.supports(workload())
        monkeypatch.setenv("PORTMOE_NPU_PRODUCT", "A2")
        assert swiglu.supports(workload()) is None


@pytest.mark.parametrize("implementation", [*FUSED, *LAST], ids=lambda i: f"{i.op}.{i.name}")
def test_a_missing_function_is_named(implementation):
    with faults.planted(f"lack:{implementation.name}"):
        assert f"has no {implementation.name}" in implementation.supports(workload(capacity=0))


def test_the_cut_vocabularys_functions_are_taken_where_they_are_measured_or_alone():
    (fused,) = LAST
    shapes = workload(torch.bfloat16, vocab=256)
    record = choose(OPERATIONS, IMPLEMENTATIONS, shapes, load_config("tiny_moe4")).record()
    assert record["cross_entropy"]["chosen"] == "chunked"
    without = load_config("tiny_moe4", ["ops.disable=[cross_entropy.chunked]"])
    assert (
        choose(OPERATIONS, IMPLEMENTATIONS, shapes, without).record()["cross_entropy"]["chosen"] == fused.name
    )
    assert "float16 or bfloat16" in fused.supports(workload(vocab=256))
    assert "127 classes" in fused.supports(workload(torch.bfloat16, vocab=127))


def test_a_function_that_was_changed_is_not_called(monkeypatch):
    """A release that takes other parameters is named, and something else computes."""
    (norm,) = (i for i in FUSED if i.op == "rms_norm")
    monkeypatch.setitem(signatures.CALLS, "npu_rms_norm", signatures.Call(("x", "gamma", "epsilon")))
    assert norm.supports(workload()) == (
        "torch_npu 2.13.0+simulated's npu_rms_norm begins with (input, gamma, epsilon), "
        "and is called with (x, gamma, epsilon)"
    )


@pytest.mark.parametrize("implementation", UNUSED, ids=lambda i: f"{i.op}.{i.name}")
def test_what_is_never_taken_says_why(implementation):
    reason = implementation.supports(workload())
    assert reason
    assert implementation.requested_by in ("moe.use_fused_gating", "moe.enable_token_rearrange_opt")
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        implementation.function()


def test_the_gradient_of_the_other_gate_serves_sigmoid_alone():
    """What the record says of it, asked of the function itself."""
    x = torch.randn(4, 8, device=NPU, requires_grad=True)
    y, expert, norm = torch_npu.npu_moe_gating_top_k(x, 2, norm_type=1, out_flag=True)
    y.square().sum().backward()
    by_hand = torch_npu.npu_moe_gating_top_k_backward(norm, 2 * y.detach(), expert, norm_type=1)
    torch.testing.assert_close(by_hand, x.grad)
    with pytest.raises(RuntimeError, match="norm_type may only be 1"):
        torch_npu.npu_moe_gating_top_k(x, 2)[0].sum().backward()


def test_more_segments_than_one_call_takes(monkeypatch):
    monkeypatch.setattr(attention, "MOST_SEQUENCES", 2)
    offsets = (0, 1, 4, 6, 10, 11)
    q, k, v = (torch.randn(11, 2, 8) for _ in range(3))
    for attend in (attention.fusion_attention, attention.fusion_attention_v2):
        ours = attend(*(t.to(NPU) for t in (q, k, v)), Segments(offsets), 0.4).cpu()
        torch.testing.assert_close(ours, plain_attention(q, k, v, Segments(offsets), 0.4))


def test_choices_that_are_no_permutation_are_not_the_vendors():
    """As many rows as choices, all of them dropped: the vendor's function would read past its rows."""
    routing = {"tokens": 3, "experts": 2, "top_k": 2, "capacity": 3}
    rows = torch.full((2, 3), 6, device=NPU)
    record = choose(OPERATIONS, IMPLEMENTATIONS, workload(**routing), load_config("tiny_moe4")).record()
    for op in ("dispatch", "combine"):
        assert record[op]["chosen"] == "gather"
    with pytest.raises(RuntimeError, match="must be distinct"):
        permutation.combine(torch.randn(6, 4, device=NPU), rows, torch.ones(2, 3, device=NPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_a_rank_no_token_came_to(dtype):
    """No rows at all: no vendor's function is asked, and every weight has a gradient of zero."""
    x = torch.randn(0, 4, device=NPU, dtype=dtype, requires_grad=True)
    weights = [
        torch.randn(2, *s, device=NPU, dtype=dtype, requires_grad=True) for s in ((6, 4), (6, 4), (4, 6))
    ]
    with faults.planted("fail:npu_grouped_matmul", "fail:npu_grouped_matmul_add_"):
        y = grouped_matmul.expert_ffn_ragged(x, torch.zeros(2, dtype=torch.int64, device=NPU), *weights)
        grads = torch.autograd.grad(y.sum(), [x, *weights], materialize_grads=True)
    assert y.shape == (0, 4)
    assert [g.count_nonzero().item() for g in grads] == [0, 0, 0, 0]


def test_weight_gradients_of_16_bit_experts_are_summed_in_float32():
    """2048 rows of one expert: in bfloat16 sums, ones would stop counting at 256."""
    x = torch.ones(2048, 1, device=NPU, dtype=torch.bfloat16)
    w = torch.ones(1, 1, 1, device=NPU, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([2048], device=NPU)
    grouped_matmul.GroupedLinear.apply(x, w, ends, None).sum().backward()
    assert w.grad.item() == 2048


def test_tensors_the_optimizer_holds_no_part_of_are_passed_over():
    from portmoe.backends.npu import fused

    lists = [[torch.empty(0, 3, device=NPU), torch.ones(2, device=NPU)] for _ in range(4)]
    fused.adamw(*lists, 1, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
    assert (lists[0][1] < 1).all()
