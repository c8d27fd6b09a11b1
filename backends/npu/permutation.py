"""Dispatch and combine by torch_npu's permutation, where every row of the buffer has a token.

The vendor's functions sort all choices, and want each row's index once: they compute the contract exactly
where the rows are a permutation of the choices, as in a dropless layer (``Workload.dropless``). A buffer with
empty rows or dropped choices is not theirs, even where it has as many rows as there are choices.
"""

import torch


def dispatch(x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    """Where rows are a permutation of the K·S choices, sorting the choices by row puts each in its row."""
    import torch_npu

    return torch_npu.npu_moe_token_permute(x_SH, row_KS.t())[0]


def combine(y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
    """Combine in float32: whether rows and weights may differ is not said; the sum is to be rounded once."""
    import torch_npu

    row_A = row_KS.t().flatten().to(torch.int32)
    weight_SK = weight_KS.t().contiguous()
    return torch_npu.npu_moe_token_unpermute(y_RH.to(weight_SK.dtype), row_A, probs=weight_SK).to(y_RH.dtype)
