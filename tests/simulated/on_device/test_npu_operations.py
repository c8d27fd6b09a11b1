"""Every implementation of the NPU backend against its operation's reference in float64 on the CPU."""

import agreement
import pytest
import torch
from torch_npu import faults

from portmoe import load_config
from portmoe.backends.npu.ops import FUSED, NpuOperations
from portmoe.ops import OPERATIONS, Segments, choose
from portmoe.ops import attention as plain_attention

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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda i: f"{i.op}.{i.name}")
def test_it_is_the_same_function(implementation):
    computed = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for changes in CASES:
            shapes = workload(dtype, **changes)
            if implementation.supports(shapes) is None:
                agreement.assert_agrees(implementation.function, OPERATIONS[implementation.op], shapes)
                computed += 1
    assert computed >= 3 or implementation.op == "topk_gating"


def test_every_fused_function_is_preferred_where_it_supports_the_case():
    config = load_config("tiny_moe4", ["model.use_flash_attn=true"])
    for capacity in (12, 0):
        shapes = workload(capacity=capacity)
        record = choose(OPERATIONS, IMPLEMENTATIONS, shapes, config).record()
        permuted = {"dispatch", "combine"}
        for implementation in FUSED:
            if capacity and implementation.op in permuted:
                reason = record[implementation.op]["candidates"][0]["reason"]
                assert "static buffer drops some" in reason
            else:
                assert record[implementation.op]["chosen"] == implementation.name


@pytest.mark.parametrize(
    ("op", "changes", "reason"),
    [
        ("attention", {"head_dim": 520}, "over 512"),
        ("attention", {"heads": 257}, "257 heads"),
        ("rotary", {"head_dim": 898}, "over 896"),
        ("expert_ffn", {"experts": 129}, "129 experts"),
        ("expert_ffn_ragged", {"experts": 129}, "129 experts"),
        ("dispatch", {"capacity": 0, "tokens": 2**23}, "over what it can sort"),
        ("swiglu", {"dtype": torch.float64}, "float64"),
    ],
    ids=str,
)
def test_it_says_what_it_does_not_support(op, changes, reason):
    implementation = next(i for i in FUSED if i.op == op)
    assert implementation.supports(workload()) is None or "capacity" in changes
    assert reason in implementation.supports(workload(**changes))


@pytest.mark.parametrize("implementation", FUSED, ids=lambda i: f"{i.op}.{i.name}")
def test_a_missing_function_is_named(implementation):
    with faults.planted(f"lack:{implementation.name}"):
        assert f"has no {implementation.name}" in implementation.supports(workload(capacity=0))


def test_the_vendors_gating_is_never_taken():
    gating = next(i for i in IMPLEMENTATIONS if i.op == "topk_gating")
    assert "no gradients" in gating.supports(workload())
    assert gating.requested_by == "moe.use_fused_gating"


def test_more_segments_than_one_call_takes(monkeypatch):
    from portmoe.backends.npu import fused

    monkeypatch.setattr(fused, "MOST_SEQUENCES", 2)
    offsets = (0, 1, 4, 6, 10, 11)
    q, k, v = (torch.randn(11, 2, 8) for _ in range(3))
    ours = fused.attention(*(t.to(NPU) for t in (q, k, v)), Segments(offsets), 0.4).cpu()
    torch.testing.assert_close(ours, plain_attention(q, k, v, Segments(offsets), 0.4))


def test_a_buffer_without_rows_is_dispatched_too():
    from portmoe.backends.npu import fused

    x, rows = (
        torch.randn(3, 4, device=NPU, requires_grad=True),
        torch.zeros(2, 3, dtype=torch.int64, device=NPU),
    )
    empty = fused.dispatch(x, rows, 0)
    assert empty.shape == (0, 4)
    out = fused.combine(empty, rows, torch.ones(2, 3, device=NPU))
    assert out.tolist() == torch.zeros(3, 4).tolist()


def test_tensors_the_optimizer_holds_no_part_of_are_passed_over():
    from portmoe.backends.npu import fused

    lists = [[torch.empty(0, 3, device=NPU), torch.ones(2, device=NPU)] for _ in range(4)]
    fused.adamw(*lists, 1, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
    assert (lists[0][1] < 1).all()
