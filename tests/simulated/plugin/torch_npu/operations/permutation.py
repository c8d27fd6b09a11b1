"""Tokens to the experts' rows and back, by the experts' numbers."""

from collections.abc import Sequence
from typing import Any

import torch

from torch_npu.operations.registry import FLOATS, RELEASE, Row, dims, documented, dtype, only

LARGEST_INDEX = 16_777_215

# The pages of 2.11 and 2.12 know one type; those of 2.13 know all.
OLD = RELEASE.startswith(("2.11", "2.12"))
TOKENS = (torch.bfloat16,) if OLD else FLOATS
SAID = f"its page, {RELEASE}"


def _choices(a: Any) -> int:
    return a.indices.shape[1] if a.indices.dim() == 2 else 1


@documented(
    dtype("tokens", *TOKENS, said=SAID),
    dims("tokens", 2),
    dtype("indices", torch.int32, torch.int64),
    dims("indices", 1, 2),
    Row("indices", "must have a row a token", lambda a: len(a.indices) == len(a.tokens)),
    Row("indices", "must have at most 512 choices a token", lambda a: _choices(a) <= 512),
    Row("indices", "must be fewer than 16777215", lambda a: a.indices.numel() < LARGEST_INDEX),
    Row(
        "indices",
        "must lie in 0 … 16777214",
        lambda a: not a.indices.numel() or (a.indices.min() >= 0 and a.indices.max() < LARGEST_INDEX),
    ),
    only("padded_mode", False),
    products=("A2", "A3"),
)
def npu_moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(permuted_tokens, sorted_indices): stable by expert; sorted_indices[a] is the row of assignment a.

    num_out_tokens: None or 0 keep every row; otherwise rows are cut as a slice cuts them.
    """
    top_k = indices.shape[1] if indices.dim() == 2 else 1
    order = indices.flatten().argsort(stable=True)
    kept = order[: num_out_tokens or None]
    permuted = tokens.index_select(0, torch.div(kept, top_k, rounding_mode="floor"))
    return permuted, order.argsort(stable=True).to(torch.int32)


@documented(
    dtype("permuted_tokens", *TOKENS, said=SAID),
    dims("permuted_tokens", 2),
    dtype("sorted_indices", torch.int32, said="its page, 2.13.0; the example of 2.11.0"),
    dims("sorted_indices", 1),
    Row(
        "sorted_indices",
        "must be one for each permuted token",
        lambda a: a.sorted_indices.shape == a.permuted_tokens.shape[:1],
    ),
    Row(
        "sorted_indices",
        "must be distinct and below their number",
        lambda a: torch.equal(
            a.sorted_indices.sort().values.cpu(), torch.arange(len(a.sorted_indices), dtype=torch.int32)
        ),
    ),
    dtype("probs", *TOKENS, said=SAID),
    dims("probs", 2),
    Row(
        "probs",
        "must be [tokens, choices]",
        lambda a: a.probs is None or a.probs.numel() == len(a.permuted_tokens),
    ),
    Row("probs", "must have at most 512 choices", lambda a: a.probs is None or a.probs.shape[1] <= 512),
    only("padded_mode", False),
    only("restore_shape", None),
    products=("A2", "A3"),
)
def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    rows = permuted_tokens.index_select(0, sorted_indices.long())
    if probs is None:
        return rows
    weighted = rows.unflatten(0, probs.shape).float() * probs.float().unsqueeze(-1)
    return weighted.sum(1).to(permuted_tokens.dtype)
