"""The stand-in's functions against their documentation, by hand-made cases: what the backend relies on."""

import math

import pytest
import torch
import torch_npu

NPU = torch.device("npu", 0)
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool, device=NPU).triu(1)


def qkv(*shape):
    return [torch.randn(shape, device=NPU) for _ in range(3)]


def attend(q, k, v, heads, layout, **settings):
    return torch_npu.npu_fusion_attention(q, k, v, heads, layout, **settings)[0]


def by_hand(q_SD, k_SD, v_SD, scale, visible):
    """One head, one query at a time, in float64."""
    rows = []
    for i, q_D in enumerate(q_SD.cpu().double()):
        keys = [j for j in range(len(k_SD)) if visible(i, j)]
        scores = [math.exp(scale * float(q_D @ k_SD[j].cpu().double())) for j in keys]
        value = sum(s * v_SD[j].cpu().double() for s, j in zip(scores, keys, strict=True))
        rows.append(value / sum(scores))
    return torch.stack(rows).float()


def test_attention_without_a_mask_is_full_whatever_the_sparse_mode():
    q, k, v = qkv(1, 5, 1, 8)
    full = by_hand(q[0, :, 0], k[0, :, 0], v[0, :, 0], 0.3, lambda i, j: True)
    causal = by_hand(q[0, :, 0], k[0, :, 0], v[0, :, 0], 0.3, lambda i, j: j <= i)
    for mode in (0, 2, 3):
        torch.testing.assert_close(
            attend(q, k, v, 1, "BSND", scale=0.3, sparse_mode=mode)[0, :, 0].cpu(), full
        )
    for mode in (2, 3):
        out = attend(q, k, v, 1, "BSND", scale=0.3, sparse_mode=mode, atten_mask=CAUSAL)
        torch.testing.assert_close(out[0, :, 0].cpu(), causal)


def test_true_in_a_mask_means_masked_out():
    q, k, v = qkv(1, 1, 4, 8)
    only_first = torch.ones(4, 4, dtype=torch.bool, device=NPU)
    only_first[:, 0] = False
    out = attend(q, k, v, 1, "BNSD", atten_mask=only_first)
    torch.testing.assert_close(out, v[:, :, :1].expand_as(out))


def test_modes_two_and_three_differ_where_there_are_more_keys_than_queries():
    q, (k, v) = torch.randn(1, 1, 2, 8, device=NPU), torch.randn(2, 1, 1, 5, 8, device=NPU)
    for mode, offset in ((2, 0), (3, 3)):
        out = attend(q, k, v, 1, "BNSD", sparse_mode=mode, atten_mask=CAUSAL)
        expected = by_hand(q[0, 0], k[0, 0], v[0, 0], 1.0, lambda i, j, o=offset: j <= i + o)
        torch.testing.assert_close(out[0, 0].cpu(), expected)


def test_layouts_agree_and_seven_values_come_back():
    q, k, v = qkv(2, 3, 6, 8)  # BNSD
    expected = attend(q, k, v, 3, "BNSD", sparse_mode=2, atten_mask=CAUSAL)
    forms = {
        "BSND": (lambda t: t.transpose(1, 2), lambda t: t.transpose(1, 2)),
        "BSH": (lambda t: t.transpose(1, 2).flatten(2), lambda t: t.unflatten(2, (3, 8)).transpose(1, 2)),
        "SBH": (
            lambda t: t.permute(2, 0, 1, 3).flatten(2),
            lambda t: t.unflatten(2, (3, 8)).permute(1, 2, 0, 3),
        ),
    }
    for layout, (to, back) in forms.items():
        out = attend(*map(to, (q, k, v)), 3, layout, sparse_mode=2, atten_mask=CAUSAL)
        torch.testing.assert_close(back(out), expected)
    packed = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    results = torch_npu.npu_fusion_attention(
        *packed, 3, "TND", sparse_mode=2, atten_mask=CAUSAL, actual_seq_qlen=[6, 12], actual_seq_kvlen=[6, 12]
    )
    assert len(results) == 7
    torch.testing.assert_close(results[0], expected.transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"atten_mask": CAUSAL[:8, :8], "sparse_mode": 2}, "compressed mask"),
        ({"atten_mask": CAUSAL.float(), "sparse_mode": 2}, "bool"),
        ({"layout": "TND"}, "host lists"),
        ({"layout": "TND", "actual_seq_qlen": torch.tensor([8]), "actual_seq_kvlen": [8]}, "host lists"),
        ({"layout": "TND", "actual_seq_qlen": [4, 4], "actual_seq_kvlen": [4, 4]}, "must be T"),
        ({"dtype": torch.float64}, "float64"),
        ({"device": "cpu"}, "on cpu"),
        ({"layout": "NDS"}, "input_layout"),
    ],
    ids=str,
)
def test_attention_refuses(settings, error):
    layout = settings.pop("layout", "BSND")
    like = {"dtype": settings.pop("dtype", torch.float32), "device": settings.pop("device", NPU)}
    shape = (8, 1, 16) if layout == "TND" else (1, 8, 1, 16)
    q = torch.zeros(shape, **like)
    with pytest.raises(RuntimeError, match=error):
        attend(q, q, q, 1, layout, **settings)


def test_rms_norm_returns_the_scale_too():
    x, gamma = torch.tensor([[3.0, 4.0]], device=NPU), torch.tensor([1.0, 2.0], device=NPU)
    y, rstd = torch_npu.npu_rms_norm(x, gamma, 0.0)
    scale = 1 / math.sqrt(12.5)
    torch.testing.assert_close(y.cpu(), torch.tensor([[3 * scale, 8 * scale]]))
    torch.testing.assert_close(rstd.cpu(), torch.tensor([[scale]]))
    with pytest.raises(RuntimeError, match="one dtype"):
        torch_npu.npu_rms_norm(x, gamma.half())


def test_rotary_pairs():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], device=NPU).view(1, 1, 1, 4)
    zeros, ones = torch.zeros_like(x), torch.ones_like(x)
    assert torch_npu.npu_rotary_mul(x, zeros, ones).flatten().tolist() == [-3, -4, 1, 2]
    assert torch_npu.npu_rotary_mul(x, zeros, ones, "interleave").flatten().tolist() == [-2, 1, -4, 3]
    with pytest.raises(RuntimeError, match="4 dimensions"):
        torch_npu.npu_rotary_mul(x[0], zeros, ones)


def test_swiglu_gates_by_the_first_half():
    out = torch_npu.npu_swiglu(torch.tensor([[100.0, 0.0, 3.0, 5.0]], device=NPU))
    assert out.tolist() == [[300.0, 0.0]]


def test_permutation_is_stable_and_comes_back():
    tokens = torch.arange(6.0, device=NPU).view(3, 2).requires_grad_()
    indices = torch.tensor([[1, 0], [0, 1], [1, 0]], device=NPU)
    permuted, rows = torch_npu.npu_moe_token_permute(tokens, indices)
    assert permuted[:, 0].tolist() == [0, 2, 4, 0, 2, 4]
    assert rows.tolist() == [3, 0, 1, 4, 5, 2]
    assert rows.dtype == torch.int32
    probs = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=NPU, requires_grad=True)
    out = torch_npu.npu_moe_token_unpermute(permuted, rows, probs=probs)
    torch.testing.assert_close(out, tokens * probs.sum(1, keepdim=True))
    out.sum().backward()
    torch.testing.assert_close(tokens.grad, probs.sum(1, keepdim=True).expand(3, 2).detach())
    torch.testing.assert_close(probs.grad, tokens.sum(1, keepdim=True).expand(3, 2).detach())
    with pytest.raises(RuntimeError, match="int32"):
        torch_npu.npu_moe_token_unpermute(permuted, rows.long(), probs=probs)
    with pytest.raises(RuntimeError, match="one sorted index"):
        torch_npu.npu_moe_token_unpermute(permuted[:4], rows, probs=probs)


def grouped(x, w, ends, group_type=0, **settings):
    ends = torch.tensor(ends, device=NPU)
    return torch_npu.npu_grouped_matmul(
        [x], [w], group_list=ends, split_item=2, group_type=group_type, **settings
    )[0]


def test_grouped_products_have_no_gradient_and_leave_memory_unwritten():
    x, w = torch.randn(5, 3, device=NPU, requires_grad=True), torch.randn(2, 3, 4, device=NPU)
    y = grouped(x, w, [2, 4])
    assert not y.requires_grad
    torch.testing.assert_close(y[:4], torch.cat((x[:2] @ w[0], x[2:4] @ w[1])).detach())
    assert y[4].isnan().all()
    torch.testing.assert_close(grouped(x, w, [2, 2], group_list_type=1)[:4], y[:4])
    by_summed = grouped(x.detach().t(), torch.ones(5, 4, device=NPU), [5, 5], group_type=2)
    torch.testing.assert_close(by_summed[0], x.detach().sum(0)[:, None].expand(3, 4))
    assert by_summed[1].isnan().all()


def test_grouped_products_refuse():
    x, w = torch.zeros(5, 3, device=NPU), torch.zeros(2, 3, 4, device=NPU)
    with pytest.raises(RuntimeError, match="over 128"):
        grouped(x, torch.zeros(129, 3, 4, device=NPU), [5] * 129)
    with pytest.raises(RuntimeError, match="transposed view"):
        grouped(x.t().contiguous(), x, [5, 5], group_type=2)
    with pytest.raises(RuntimeError, match="not fall"):
        grouped(x, w, [5, 4])
    with pytest.raises(RuntimeError, match="float64"):
        grouped(x.double(), w.double(), [2, 5])


def test_adam_w_takes_the_powers_of_the_step_before():
    one = [torch.ones(1, device=NPU) for _ in range(4)]
    grad, var, m, v = one
    m.zero_(), v.zero_()
    torch_npu.npu_apply_adam_w(1.0, 1.0, 0.1, 0.5, 0.9, 0.99, 0.0, grad, None, False, False, out=(var, m, v))
    # The first step of Adam moves by lr, and the decay takes lr · 0.5 before.
    assert var.item() == pytest.approx(0.95 - 0.1)
    assert m.item() == pytest.approx(0.1)
    assert v.item() == pytest.approx(0.01)


def test_gating_is_for_inference():
    x = torch.randn(4, 8, device=NPU, requires_grad=True)
    weights, experts, rows = torch_npu.npu_moe_gating_top_k_softmax(x, None, 2)
    assert not weights.requires_grad
    assert experts.tolist() == x.topk(2).indices.tolist()
    assert rows.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
