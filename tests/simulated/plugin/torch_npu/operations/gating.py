"""The router's choice: softmax for inference, sigmoid with a gradient."""

from typing import Any

import torch

from torch_npu.operations.registry import (
    FLOATS,
    Row,
    dims,
    documented,
    dtype,
    like,
    not_simulated,
    only,
    without_autograd,
)


@documented(
    dtype("x", *FLOATS),
    dims("x", 2, 3),
    not_simulated("finished"),
    Row("k", "must be 1 … experts", lambda a: 1 <= a.k <= a.x.shape[-1]),
    Row("k", "must be at most 1024", lambda a: a.k <= 1024),
    products=("A2",),
)
@without_autograd
def npu_moe_gating_top_k_softmax(
    x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights, expert_idx, row_idx), for inference."""
    weights, experts = torch.softmax(x.float(), -1).topk(k)
    rows = torch.arange(experts.numel(), dtype=torch.int32, device=x.device)
    row_idx = rows.view(k, -1).t().reshape(experts.shape)
    return weights.to(x.dtype), experts.to(torch.int32), row_idx


SIGMOID = 1


def _groups_fit(a: Any) -> bool:
    experts = a.x.shape[1]
    if a.group_count <= 0 or experts % a.group_count:
        return False
    size = experts // a.group_count
    # The page asks for more than two; one group of any size is what every call without groups has.
    return a.group_count == 1 or (size > 2 and -(-size // 32) * 32 * a.group_count <= 2048)


class _NoGradient(torch.autograd.Function):
    """The registered backward serves sigmoid alone."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("npu_moe_gating_top_k_backward: norm_type may only be 1 (simulated npu)")


@documented(
    dtype("x", *FLOATS),
    dims("x", 2),
    Row("x", "must have at most 2048 experts", lambda a: a.x.shape[1] <= 2048),
    not_simulated("input_ids", "tid2eid"),
    like("bias", "x"),
    Row("bias", "must have one number an expert", lambda a: a.bias is None or a.bias.shape == a.x.shape[1:]),
    Row("group_count", "must divide the experts into groups of more than 2, 2048 in all", _groups_fit),
    Row("k_group", "must be 1 … group_count", lambda a: 1 <= a.k_group <= a.group_count),
    Row(
        "k",
        "must be 1 … the experts of k_group groups",
        lambda a: 1 <= a.k <= a.x.shape[1] // a.group_count * a.k_group,
    ),
    only("group_select_mode", 0, 1),
    only("renorm", 0),
    only("norm_type", 0, SIGMOID),
)
def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, expert_idx, norm): the best groups' best experts; sigmoid weights sum to the factor."""
    norm = torch.sigmoid(x.float()) if norm_type == SIGMOID else torch.softmax(x.float(), -1)
    score = norm.detach() if bias is None else norm.detach() + bias.float()
    grouped = score.unflatten(1, (group_count, -1))
    best = grouped.topk(2 if group_select_mode else 1, dim=-1).values.sum(-1)
    outside = torch.ones_like(best, dtype=torch.bool).scatter(1, best.topk(k_group, dim=1).indices, False)
    score = grouped.masked_fill(outside[..., None], -torch.inf).flatten(1)
    expert = score.topk(k, dim=1).indices
    y = norm.gather(1, expert)
    if norm_type == SIGMOID:
        y = y / (y.sum(1, keepdim=True) + eps)
    y = (y * routed_scaling_factor).to(x.dtype)
    if norm_type != SIGMOID and y.requires_grad:
        y = _NoGradient.apply(y)
    return y, expert.to(torch.int32), norm.detach() if out_flag else norm.new_empty(0)


@documented(
    dtype("x_norm", torch.float32),
    dims("x_norm", 2),
    Row("x_norm", "must have 2 to 2048 experts", lambda a: 2 <= a.x_norm.shape[1] <= 2048),
    dtype("grad_y", *FLOATS),
    dims("grad_y", 2),
    Row("grad_y", "must be contiguous", lambda a: a.grad_y.is_contiguous()),
    Row("grad_y", "must have 1 … experts columns", lambda a: 1 <= a.grad_y.shape[1] <= a.x_norm.shape[1]),
    dtype("expertIdx", torch.int32),
    Row("expertIdx", "must have grad_y's shape", lambda a: a.expertIdx.shape == a.grad_y.shape),
    Row("expertIdx", "must be contiguous", lambda a: a.expertIdx.is_contiguous()),
    only("norm_type", SIGMOID),
    only("renorm", 0),
)
@without_autograd
def npu_moe_gating_top_k_backward(
    x_norm: torch.Tensor,
    grad_y: torch.Tensor,
    expertIdx: torch.Tensor,
    *,
    renorm: int = 0,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> torch.Tensor:
    """The gradient of x for y = s / (Σ s + eps) · factor over the choices, s = sigmoid(x)."""
    chosen = x_norm.gather(1, expertIdx.long())
    total = chosen.sum(1, keepdim=True) + eps
    grad = grad_y.float() * routed_scaling_factor
    grad_s = grad / total - (grad * chosen).sum(1, keepdim=True) / total.square()
    grad_x = torch.zeros_like(x_norm).scatter(1, expertIdx.long(), grad_s * chosen * (1 - chosen))
    return grad_x.to(grad_y.dtype)
