"""Grouped matrix products, which have no autograd of their own."""

from itertools import accumulate, pairwise
from typing import Any

import torch

from torch_npu.operations.registry import (
    FLOATS,
    HALVES,
    Row,
    dims,
    documented,
    dtype,
    like,
    not_simulated,
    only,
    without_autograd,
)

MOST_GROUPS = 1024
INNER_LIMIT = 65536


def _ends(group_list: torch.Tensor, group_list_type: int) -> list[int]:
    return group_list.tolist() if group_list_type == 0 else list(accumulate(group_list.tolist()))


def _one(condition: Any) -> Any:
    """A condition on the only x and the only weight."""
    return lambda a: condition(a.x[0], a.weight[0])


def _stored_width(matrix: torch.Tensor) -> int:
    """The last dimension as it lies in memory: a transposed view counts as what it is a view of."""
    transposed = matrix.stride(-1) != 1 and matrix.stride(-2) == 1
    return matrix.shape[-2 if transposed else -1]


@documented(
    Row(
        "x",
        "and weight must be one tensor each here",
        lambda a: len(a.x) == len(a.weight) == 1,
        "this stand-in",
    ),
    Row("x", "must be float16, bfloat16 or float32", _one(lambda x, w: x.dtype in FLOATS)),
    Row("weight", "must have x's dtype", _one(lambda x, w: x.dtype == w.dtype)),
    not_simulated("bias", "scale", "offset", "antiquant_scale", "antiquant_offset", "per_token_scale"),
    not_simulated("activation_input", "activation_quant_scale", "activation_quant_offset", "tuning_config"),
    not_simulated("output_dtype", "x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype"),
    only("act_type", 0),
    only("group_type", -1, 0),
    Row("group_type", "-1 is not simulated", lambda a: a.group_type != -1, "this stand-in"),
    Row("split_item", "must be 2 or 3 for one result", lambda a: a.split_item in (2, 3)),
    Row("x", "must have 2 dimensions", _one(lambda x, w: x.dim() == 2)),
    Row("weight", "must have 3 dimensions", _one(lambda x, w: w.dim() == 3)),
    Row("weight", "must have x's summed dimension", _one(lambda x, w: w.shape[1] == x.shape[1])),
    Row("x", "must not be transposed", _one(lambda x, w: x.stride(1) == 1 or min(x.shape) <= 1)),
    Row("x", "must have a last dimension below 65536", _one(lambda x, w: x.shape[1] < INNER_LIMIT)),
    Row(
        "weight", "must have a last dimension below 65536", _one(lambda x, w: _stored_width(w) < INNER_LIMIT)
    ),
    Row("group_list", "must be given", lambda a: a.group_list is not None),
    Row(
        "group_list",
        "as a host list is not simulated",
        lambda a: isinstance(a.group_list, torch.Tensor),
        "this stand-in",
    ),
    dtype("group_list", torch.int64),
    dims("group_list", 1),
    only("group_list_type", 0, 1),
    Row("group_list", "must have at most 1024 groups", lambda a: len(a.group_list) <= MOST_GROUPS),
    Row("group_list", "must have one group a weight", lambda a: len(a.group_list) == len(a.weight[0])),
    Row(
        "group_list",
        "must not be of length 1 as counts",
        lambda a: a.group_list_type == 0 or len(a.group_list) != 1,
    ),
    Row(
        "group_list",
        "must not fall, nor be negative",
        lambda a: all(p <= q for p, q in pairwise([0, *_ends(a.group_list, a.group_list_type)])),
    ),
    Row(
        "group_list",
        "must end at x's rows",
        lambda a: _ends(a.group_list, a.group_list_type)[-1] == len(a.x[0]),
    ),
    products=("A2",),
)
@without_autograd
def npu_grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    bias: list[torch.Tensor] | None = None,
    scale: list[torch.Tensor] | None = None,
    offset: list[torch.Tensor] | None = None,
    antiquant_scale: list[torch.Tensor] | None = None,
    antiquant_offset: list[torch.Tensor] | None = None,
    per_token_scale: list[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    activation_input: list[torch.Tensor] | None = None,
    activation_quant_scale: list[torch.Tensor] | None = None,
    activation_quant_offset: list[torch.Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: list[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[torch.Tensor]:
    """One product a group of rows."""
    (left,), (right,) = x, weight
    out = left.new_full((len(left), right.shape[2]), torch.nan)
    for (start, end), matrix in zip(
        pairwise([0, *_ends(group_list, group_list_type)]), right.unbind(0), strict=True
    ):
        if end > start:
            out[start:end] = left[start:end] @ matrix
    return [out]


_SUMMED = (
    dtype("input", torch.float32),
    dims("input", 3),
    dtype("x", *HALVES),
    dims("x", 2),
    like("weight", "x"),
    dims("weight", 2),
    Row(
        "input",
        "must be [groups, M, N] for x [K, M] and weight [K, N]",
        lambda a: (
            a.input.shape == (len(a.group_list), a.x.shape[1], a.weight.shape[1])
            and len(a.x) == len(a.weight)
        ),
    ),
    only("transpose_x", True),
    only("transpose_weight", False),
    only("group_type", 2),
    only("group_list_type", 0, 1),
    dtype("group_list", torch.int64),
    dims("group_list", 1),
    Row("group_list", "must have at most 1024 groups", lambda a: len(a.group_list) <= MOST_GROUPS),
    Row(
        "group_list",
        "must not fall, nor be negative, nor pass x's rows",
        lambda a: all(
            0 <= p <= q <= len(a.x) for p, q in pairwise([0, *_ends(a.group_list, a.group_list_type)])
        ),
    ),
    Row("x", "must have a last dimension below 65536", lambda a: a.x.shape[1] < INNER_LIMIT),
    Row("weight", "must have a last dimension below 65536", lambda a: a.weight.shape[1] < INNER_LIMIT),
)


@documented(*_SUMMED, products=("A2", "A3"))
@without_autograd
def npu_grouped_matmul_add_(
    input: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    *,
    transpose_x: bool = True,
    transpose_weight: bool = False,
    group_type: int = 2,
    group_list_type: int | None = 0,
) -> torch.Tensor:
    """input[g] += xᵀ · weight over the rows of group g, in float32."""
    for number, (start, end) in enumerate(pairwise([0, *_ends(group_list, group_list_type)])):
        input[number] += x[start:end].t().float() @ weight[start:end].float()
    return input


@documented(*_SUMMED, products=("A2", "A3"))
@without_autograd
def npu_grouped_matmul_add(
    input: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    *,
    transpose_x: bool = True,
    transpose_weight: bool = False,
    group_type: int = 2,
    group_list_type: int | None = 0,
) -> torch.Tensor:
    """As npu_grouped_matmul_add_, into a copy."""
    out = input.clone()
    for number, (start, end) in enumerate(pairwise([0, *_ends(group_list, group_list_type)])):
        out[number] += x[start:end].t().float() @ weight[start:end].float()
    return out
