"""The experts' networks by torch_npu's grouped matrix product, which has no autograd of its own.

Written against the documented signature; run on a simulated device only.
"""

from typing import Any

import torch
import torch.nn.functional as F

from portmoe.ops.expert_ffn import expert_ffn as plain_expert_ffn

MOST_GROUPS = 128
BY_ROWS, BY_SUMMED = 0, 2  # group_type: groups of x's rows, or of the dimension that is summed over
ONE_RESULT = 2  # split_item
CUMULATIVE = 0  # group_list_type: the group list holds ends, not counts


def expert_ffn(
    x_ECH: torch.Tensor, w1_EFH: torch.Tensor, w3_EFH: torch.Tensor, w2_EHF: torch.Tensor
) -> torch.Tensor:
    experts, capacity, _ = x_ECH.shape
    if capacity == 0:
        return plain_expert_ffn(x_ECH, w1_EFH, w3_EFH, w2_EHF)
    ends_E = torch.arange(1, experts + 1, device=x_ECH.device) * capacity
    y_RH = expert_ffn_ragged(x_ECH.flatten(0, 1), ends_E, w1_EFH, w3_EFH, w2_EHF)
    return y_RH.unflatten(0, (experts, capacity))


def expert_ffn_ragged(
    x_RH: torch.Tensor,
    ends_E: torch.Tensor,
    w1_EFH: torch.Tensor,
    w3_EFH: torch.Tensor,
    w2_EHF: torch.Tensor,
) -> torch.Tensor:
    gate_RF = GroupedLinear.apply(x_RH, w1_EFH, ends_E)
    up_RF = GroupedLinear.apply(x_RH, w3_EFH, ends_E)
    return GroupedLinear.apply(F.silu(gate_RF) * up_RF, w2_EHF, ends_E)


class GroupedLinear(torch.autograd.Function):
    """y[r] = w[e] · x[r] for the rows r of expert e: x_RI, w_EOI, ends_E → y_RO."""

    @staticmethod
    def forward(ctx: Any, x_RI: torch.Tensor, w_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_RI, w_EOI, ends_E)
        return _product(x_RI, w_EOI.transpose(1, 2), ends_E, BY_ROWS)

    @staticmethod
    def backward(ctx: Any, grad_RO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_RI, w_EOI, ends_E = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()  # its transpose must be a plain transposed view
        grad_x_RI = grad_w_EOI = None
        if ctx.needs_input_grad[0]:
            grad_x_RI = _product(grad_RO, w_EOI, ends_E, BY_ROWS)
        if ctx.needs_input_grad[1]:
            grad_w_EOI = _product(grad_RO.t(), x_RI, ends_E, BY_SUMMED)
            # An expert without rows: the documentation does not say that its product is written.
            empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
            grad_w_EOI.masked_fill_(empty_E[:, None, None], 0.0)
        return grad_x_RI, grad_w_EOI, None


def _product(left: torch.Tensor, right: torch.Tensor, ends_E: torch.Tensor, group_type: int) -> torch.Tensor:
    import torch_npu

    (result,) = torch_npu.npu_grouped_matmul(
        [left],
        [right],
        group_list=ends_E,
        split_item=ONE_RESULT,
        group_type=group_type,
        group_list_type=CUMULATIVE,
    )
    return result
