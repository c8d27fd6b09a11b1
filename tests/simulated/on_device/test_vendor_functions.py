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


def test_rms_norm_returns_the_scale_too():
    x, gamma = torch.tensor([[3.0, 4.0]], device=NPU), torch.tensor([1.0, 2.0], device=NPU)
    y, rstd = torch_npu.npu_rms_norm(x, gamma, 0.0)
    scale = 1 / math.sqrt(12.5)
    torch.testing.assert_close(y.cpu(), torch.tensor([[3 * scale, 8 * scale]]))
    torch.testing.assert_close(rstd.cpu(), torch.tensor([[scale]]))


def test_rotary_pairs():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], device=NPU).view(1, 1, 1, 4)
    zeros, ones = torch.zeros_like(x), torch.ones_like(x)
    assert torch_npu.npu_rotary_mul(x, zeros, ones).flatten().tolist() == [-3, -4, 1, 2]
    assert torch_npu.npu_rotary_mul(x, zeros, ones, "interleave").flatten().tolist() == [-2, 1, -4, 3]


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
    assert len(torch_npu.npu_moe_token_permute(tokens, indices, 0)[0]) == 6  # 0 keeps all
    assert torch_npu.npu_moe_token_permute(tokens, indices, -2)[0][:, 0].tolist() == [0, 2, 4, 0]


def test_grouped_products_have_no_gradient():
    x, w = torch.randn(5, 3, device=NPU, requires_grad=True), torch.randn(3, 3, 4, device=NPU)
    settings = {"split_item": 2, "group_type": 0}
    (y,) = torch_npu.npu_grouped_matmul([x], [w], group_list=torch.tensor([2, 2, 5], device=NPU), **settings)
    assert not y.requires_grad
    torch.testing.assert_close(y, torch.cat((x[:2] @ w[0], x[2:] @ w[2])).detach())
    counts = {"group_list": torch.tensor([2, 0, 3], device=NPU), "group_list_type": 1}
    assert torch.equal(torch_npu.npu_grouped_matmul([x], [w], **counts, **settings)[0], y)


def test_grouped_sums_are_added_to_what_is_there():
    x, w = (torch.randn(5, n, device=NPU).bfloat16() for n in (3, 4))
    before = torch.full((2, 3, 4), 7.0, device=NPU)
    out = before.clone()
    assert torch_npu.npu_grouped_matmul_add_(out, x, w, torch.tensor([5, 5], device=NPU)) is not None
    torch.testing.assert_close(out[0], 7.0 + x.float().t() @ w.float())
    assert torch.equal(out[1], before[1])
    assert torch.equal(torch_npu.npu_grouped_matmul_add(before, x, w, torch.tensor([5, 5], device=NPU)), out)


def test_a_map_drops_what_an_experts_rows_do_not_hold_and_comes_back():
    tokens = torch.arange(1.0, 5.0, device=NPU).view(4, 1).requires_grad_()
    routed = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 1]], device=NPU, dtype=torch.int8)
    probs = torch.tensor([[0.5, 0], [0.25, 0], [0.5, 0.5], [0, 1.0]], device=NPU)
    rows, weights, token = torch_npu.npu_moe_token_permute_with_routing_map(
        tokens, routed, probs=probs, num_out_tokens=4, drop_and_pad=True
    )
    assert rows.flatten().tolist() == [1, 2, 3, 4]  # the third token found expert 0 full
    assert weights.tolist() == [0.5, 0.25, 0.5, 1.0]
    assert token.tolist() == [0, 1, 2, 3]
    back = torch_npu.npu_moe_token_unpermute_with_routing_map(
        rows, token, [4, 1], probs=probs, routing_map=routed, drop_and_pad=True
    )
    assert back.flatten().tolist() == [0.5, 0.5, 1.5, 4.0]
    back.sum().backward()
    assert tokens.grad.flatten().tolist() == [0.5, 0.25, 0.5, 1.0]


def test_a_map_without_drops_is_the_permutation_by_expert():
    tokens = torch.randn(3, 2, device=NPU)
    routed = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]], device=NPU, dtype=torch.bool)
    by_map, _, place = torch_npu.npu_moe_token_permute_with_routing_map(tokens, routed, num_out_tokens=6)
    indices = torch.tensor([[0, 2], [1, 2], [0, 1]], device=NPU)
    by_index, rows = torch_npu.npu_moe_token_permute(tokens, indices)
    assert torch.equal(by_map, by_index)
    assert torch.equal(place, rows)
    probs = torch.rand(3, 3, device=NPU)
    back = torch_npu.npu_moe_token_unpermute_with_routing_map(
        by_map, place, [3, 2], probs=probs, routing_map=routed
    )
    torch.testing.assert_close(back, tokens * (probs * routed).sum(1, keepdim=True))


def test_a_rope_beside_the_heads_is_one_wider_head():
    q, k, v = (torch.randn(6, 2, 16, device=NPU).bfloat16() for _ in range(3))
    q_rope, k_rope = (torch.randn(6, 2, 8, device=NPU).bfloat16() for _ in range(2))
    packed = {"sparse_mode": 2, "atten_mask": CAUSAL, "actual_seq_qlen": [6], "actual_seq_kvlen": [6]}
    beside = torch_npu.npu_fusion_attention_v2(
        q, k, v, 2, "TND", query_rope=q_rope, key_rope=k_rope, **packed
    )[0]
    joined = torch.cat((q, q_rope), -1), torch.cat((k, k_rope), -1)
    assert torch.equal(beside, torch_npu.npu_fusion_attention_v2(*joined, v, 2, "TND", **packed)[0])


def test_keys_of_fewer_heads_are_shared_and_a_sink_takes_its_part():
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    out = attend(q.to(NPU), k.to(NPU), v.to(NPU), 4, "BNSD", scale=0.3, sink=torch.zeros(4, device=NPU))
    for head in range(4):
        scores = 0.3 * q[0, head] @ k[0, head // 2].t()
        weights = scores.exp() / (scores.exp().sum(1, keepdim=True) + 1)  # exp of a sink of 0
        torch.testing.assert_close(out[0, head].cpu(), weights @ v[0, head // 2])


def test_statistics_come_head_first_in_the_packed_layout():
    q = torch.randn(6, 3, 8, device=NPU)
    packed = {"actual_seq_qlen": [2, 6], "actual_seq_kvlen": [2, 6]}
    head_first = torch_npu.npu_fusion_attention(q, q, q, 3, "TND", **packed)[1]
    token_first = torch_npu.npu_fusion_attention(q, q, q, 3, "TND", softmax_layout="TND", **packed)[1]
    assert head_first.shape == (3, 6, 8)
    assert torch.equal(head_first.transpose(0, 1), token_first)
    left_out = torch_npu.npu_fusion_attention(
        q, q, q, 3, "TND", actual_seq_qlen=[4, 0], actual_seq_kvlen=[4, 0]
    )
    assert left_out[0][4:].isnan().all()


def test_the_cut_vocabularys_functions_give_the_loss_and_its_gradient():
    x, weight = torch.randn(9, 16).bfloat16(), torch.randn(256, 16).bfloat16()
    target = torch.randint(256, (9,))
    leaves = [t.float().requires_grad_() for t in (x, weight)]
    loss = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].t(), target, reduction="none")
    expected = torch.autograd.grad(loss.sum(), leaves)
    parts = []
    for start in (0, 128):  # two ranks
        part = weight[start : start + 128].to(NPU)
        parts.append(
            torch_npu.npu_fused_linear_online_max_sum(x.to(NPU), part, target.to(NPU), start, start + 128)
        )
    largest = torch.maximum(parts[0][0], parts[1][0])
    total = sum(p[1] * torch.exp(p[0] - largest) for p in parts)
    predicted = parts[0][2] + parts[1][2]
    ours, _ = torch_npu.npu_fused_cross_entropy_loss_with_max_sum(largest, total, predicted)
    torch.testing.assert_close(ours.cpu(), loss.detach(), rtol=2e-2, atol=2e-2)
    grad_x = 0
    for number, (*_, mask, local, _) in enumerate(parts):
        part = weight[128 * number : 128 * (number + 1)].to(NPU)
        by_x, by_weight = torch_npu.npu_fused_linear_cross_entropy_loss_with_max_sum_backward(
            torch.ones(9, device=NPU), x.to(NPU), part, mask, local, logits_max=largest, sum_exp_logits=total
        )
        grad_x = grad_x + by_x.float().cpu()
        wanted = expected[1][128 * number : 128 * (number + 1)]
        torch.testing.assert_close(by_weight.float().cpu(), wanted, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(grad_x, expected[0], rtol=5e-2, atol=5e-2)


def test_the_plain_losss_negative_ignored_label_ignores_nothing():
    x, target = torch.randn(3, 5, device=NPU), torch.tensor([0, 1, 2], device=NPU)
    loss = torch_npu.npu_cross_entropy_loss(x, target, reduction="none", ignore_index=1)[0]
    assert loss[1] == 0
    assert (loss[[0, 2]] > 0).all()


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
