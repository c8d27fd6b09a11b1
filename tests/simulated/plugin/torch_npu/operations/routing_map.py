"""Tokens to the experts' rows and back, by a map of tokens and experts.

How a padded row is chosen is not documented beyond its index being a token's: here it is a token that was not
routed to the expert, in order.
"""

from collections.abc import Sequence
from typing import Any

import torch

from torch_npu.operations.registry import FLOATS, Row, dims, documented, dtype

LARGEST = 16_777_215
MAP = (torch.int8, torch.bool)


def _of_tokens(tensor: str, other: str) -> Any:
    """probs has the tokens' dtype, or is float32 where they are bfloat16."""

    def holds(a: Any) -> bool:
        probs, tokens = getattr(a, tensor), getattr(a, other)
        if probs is None or probs.dtype == tokens.dtype:
            return True
        return probs.dtype == torch.float32 and tokens.dtype == torch.bfloat16

    return holds


def _top_k(a: Any) -> int:
    return (len(a.tokens) if a.num_out_tokens is None else a.num_out_tokens) // max(1, len(a.tokens))


@documented(
    dtype("tokens", *FLOATS),
    dims("tokens", 2),
    dtype("routing_map", *MAP),
    dims("routing_map", 2),
    Row("routing_map", "must have a row a token", lambda a: len(a.routing_map) == len(a.tokens)),
    Row(
        "routing_map",
        "must hold 0 and 1 alone",
        lambda a: bool(((a.routing_map == 0) | (a.routing_map == 1)).all()),
    ),
    Row(
        "routing_map",
        "must have fewer than 16777215 tokens and experts",
        lambda a: max(a.routing_map.shape) < LARGEST,
    ),
    Row(
        "probs",
        "must have routing_map's shape",
        lambda a: a.probs is None or a.probs.shape == a.routing_map.shape,
    ),
    Row("probs", "must have tokens' dtype, or be float32 beside bfloat16", _of_tokens("probs", "tokens")),
    Row(
        "num_out_tokens",
        "must lie in 0 … tokens · experts",
        lambda a: a.num_out_tokens is None or 0 <= a.num_out_tokens <= a.routing_map.numel(),
    ),
    Row(
        "routing_map",
        "must have num_out_tokens // tokens choices a token, fewer than 512, without drop_and_pad",
        lambda a: a.drop_and_pad or (_top_k(a) < 512 and bool((a.routing_map.sum(1) == _top_k(a)).all())),
    ),
    Row(
        "num_out_tokens",
        "must leave fewer than 16777215 rows without drop_and_pad",
        lambda a: a.drop_and_pad or _top_k(a) * len(a.tokens) < LARGEST,
    ),
)
def npu_moe_token_permute_with_routing_map(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    *,
    probs: torch.Tensor | None = None,
    num_out_tokens: int | None = None,
    drop_and_pad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(permuted_tokens, permuted_probs, sorted_indices), by expert and then in the tokens' order."""
    experts = routing_map.shape[1]
    rows = len(tokens) if num_out_tokens is None else num_out_tokens
    by_expert_ET = routing_map.bool().t()
    if drop_and_pad:
        capacity = rows // experts
        token_EC = by_expert_ET.long().argsort(dim=1, descending=True, stable=True)[:, :capacity]
        token_R = token_EC.flatten()
        expert_R = torch.arange(experts, device=tokens.device).repeat_interleave(capacity)
        indices = token_R.to(torch.int32)
    else:
        expert_R, token_R = by_expert_ET.nonzero(as_tuple=True)
        indices = token_R.argsort(stable=True).to(torch.int32)
    permuted_probs = tokens.new_empty(0) if probs is None else probs[token_R, expert_R]
    return tokens.index_select(0, token_R), permuted_probs, indices


@documented(
    dtype("permuted_tokens", *FLOATS),
    dims("permuted_tokens", 2),
    dtype("sorted_indices", torch.int32),
    dims("sorted_indices", 1),
    Row("sorted_indices", "must be one a row", lambda a: len(a.sorted_indices) == len(a.permuted_tokens)),
    Row(
        "restore_shape",
        "must be (tokens, hidden)",
        lambda a: len(a.restore_shape) == 2 and a.restore_shape[1] == a.permuted_tokens.shape[1],
    ),
    Row(
        "sorted_indices",
        "must lie in −1 … rows − 1, or with drop_and_pad in 0 … tokens − 1",
        lambda a: (
            not len(a.sorted_indices)
            or (
                a.sorted_indices.min() >= (0 if a.drop_and_pad else -1)
                and a.sorted_indices.max() < (a.restore_shape[0] if a.drop_and_pad else len(a.sorted_indices))
            )
        ),
    ),
    Row("probs", "must come with routing_map", lambda a: a.probs is None or a.routing_map is not None),
    dtype("routing_map", *MAP),
    Row(
        "routing_map",
        "must be [tokens, experts], as probs",
        lambda a: (
            a.routing_map is None
            or (
                len(a.routing_map) == a.restore_shape[0]
                and (a.probs is None or a.probs.shape == a.routing_map.shape)
            )
        ),
    ),
    Row(
        "probs",
        "must have permuted_tokens' dtype, or be float32 beside bfloat16",
        _of_tokens("probs", "permuted_tokens"),
    ),
    Row(
        "sorted_indices",
        "must give a capacity of at most the tokens with drop_and_pad",
        lambda a: (
            not a.drop_and_pad
            or a.routing_map is None
            or len(a.sorted_indices) // a.routing_map.shape[1] <= a.restore_shape[0]
        ),
        "its page, 2.13.0: to be refused in a later release",
    ),
    Row(
        "sorted_indices",
        "must be at most 512 a token without drop_and_pad",
        lambda a: a.drop_and_pad or len(a.sorted_indices) <= 512 * a.restore_shape[0],
    ),
    products=("A2", "A3"),
)
def npu_moe_token_unpermute_with_routing_map(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    *,
    probs: torch.Tensor | None = None,
    routing_map: torch.Tensor | None = None,
    drop_and_pad: bool = False,
) -> torch.Tensor:
    """The weighted rows of each token, summed; a row that was not routed has no part in it."""
    tokens = restore_shape[0]
    out = permuted_tokens.new_zeros(restore_shape, dtype=torch.float32)
    if drop_and_pad:
        token_R, rows = sorted_indices.long(), permuted_tokens.float()
        if probs is not None:
            expert_R = torch.arange(routing_map.shape[1], device=rows.device).repeat_interleave(
                len(token_R) // routing_map.shape[1]
            )
            weight_R = torch.where(routing_map.bool(), probs, 0)[token_R, expert_R]
            rows = rows * weight_R.float()[:, None]
        return out.index_add(0, token_R, rows).to(permuted_tokens.dtype)
    used = sorted_indices >= 0
    place_TK = sorted_indices.long().clamp(min=0).view(tokens, -1)
    rows_TKH = permuted_tokens.float()[place_TK] * used.view(tokens, -1, 1)
    if probs is not None:
        weight_A = probs[routing_map.bool()].float()  # by token, and by expert within
        weights = torch.zeros(used.shape, device=weight_A.device).masked_scatter(used, weight_A)
        rows_TKH = rows_TKH * weights.view(tokens, -1, 1)
    return rows_TKH.sum(1).to(permuted_tokens.dtype)
