"""The experts' networks by torch_npu's grouped products, which have no autograd of their own.

Rows times weights is ``npu_grouped_matmul``. The weights' gradients sum over the rows of a group, for which
the vendor has ``npu_grouped_matmul_add_``: 16-bit factors, sums in float32. Float32 factors are none of its
types, so there each expert's product is torch's own.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from portmoe.ops.expert_ffn import expert_ffn as plain_expert_ffn
from portmoe.ops.expert_ffn import expert_ffn_ragged as plain_expert_ffn_ragged

BY_ROWS = 0  # group_type: groups of x's rows
ONE_RESULT = 2  # split_item
CUMULATIVE = 0  # group_list_type: the group list holds ends, not counts
ACCUMULATED = (torch.float16, torch.bfloat16)  # factors npu_grouped_matmul_add_ takes


def expert_ffn(
    x_ECH: torch.Tensor, w1_EFH: torch.Tensor, w3_EFH: torch.Tensor, w2_EHF: torch.Tensor
) -> torch.Tensor:
    experts, capacity, _ = x_ECH.shape
    if capacity == 0:
        return plain_expert_ffn(x_ECH, w1_EFH, w3_EFH, w2_EHF)
    ends_E = torch.arange(1, experts + 1, device=x_ECH.device) * capacity
    y_RH = _expert_ffn(x_ECH.flatten(0, 1), ends_E, capacity, w1_EFH, w3_EFH, w2_EHF)
    return y_RH.unflatten(0, (experts, capacity))


def expert_ffn_ragged(
    x_RH: torch.Tensor,
    ends_E: torch.Tensor,
    w1_EFH: torch.Tensor,
    w3_EFH: torch.Tensor,
    w2_EHF: torch.Tensor,
) -> torch.Tensor:
    if not x_RH.shape[0]:  # a rank no token came to: the documentation knows no product without rows
        return plain_expert_ffn_ragged(x_RH, ends_E, w1_EFH, w3_EFH, w2_EHF)
    return _expert_ffn(x_RH, ends_E, None, w1_EFH, w3_EFH, w2_EHF)


def _expert_ffn(
    x_RH: torch.Tensor,
    ends_E: torch.Tensor,
    capacity: int | None,
    w1_EFH: torch.Tensor,
    w3_EFH: torch.Tensor,
    w2_EHF: torch.Tensor,
) -> torch.Tensor:
    gate_RF = GroupedLinear.apply(x_RH, w1_EFH, ends_E, capacity)
    up_RF = GroupedLinear.apply(x_RH, w3_EFH, ends_E, capacity)
    return GroupedLinear.apply(F.silu(gate_RF) * up_RF, w2_EHF, ends_E, capacity)


class GroupedLinear(torch.autograd.Function):
    """y[r] = w[e] · x[r] for the rows r of expert e: x_RI, w_EOI, ends_E → y_RO.

    ``capacity``: the rows every expert has, or None where ``ends_E`` alone knows.
    """

    @staticmethod
    def forward(
        ctx: Any, x_RI: torch.Tensor, w_EOI: torch.Tensor, ends_E: torch.Tensor, capacity: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x_RI, w_EOI, ends_E)
        ctx.capacity = capacity
        return _by_rows(x_RI, w_EOI.transpose(1, 2), ends_E)

    @staticmethod
    def backward(ctx: Any, grad_RO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_RI, w_EOI, ends_E = ctx.saved_tensors
        grad_x_RI = grad_w_EOI = None
        if ctx.needs_input_grad[0]:
            grad_x_RI = _by_rows(grad_RO, w_EOI, ends_E)
        if ctx.needs_input_grad[1]:
            grad_w_EOI = _by_expert(grad_RO, x_RI, ends_E, ctx.capacity)
        return grad_x_RI, grad_w_EOI, None, None


def _by_rows(x_RI: torch.Tensor, w_EIO: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Rows times their expert's matrix. A matrix may be a transposed view, the rows may not."""
    import torch_npu

    (result,) = torch_npu.npu_grouped_matmul(
        [x_RI.contiguous()],
        [w_EIO],
        group_list=ends_E,
        split_item=ONE_RESULT,
        group_type=BY_ROWS,
        group_list_type=CUMULATIVE,
    )
    return result


def _by_expert(
    grad_RO: torch.Tensor, x_RI: torch.Tensor, ends_E: torch.Tensor, capacity: int | None
) -> torch.Tensor:
    """[E,O,I], the sum of grad · xᵀ over each expert's rows; zero for an expert without rows."""
    if x_RI.dtype in ACCUMULATED:
        return _accumulated(grad_RO, x_RI, ends_E).to(x_RI.dtype)
    if capacity is not None:
        grad_ECO, x_ECI = (t.unflatten(0, (-1, capacity)) for t in (grad_RO, x_RI))
        return torch.bmm(grad_ECO.transpose(1, 2), x_ECI)
    return torch.stack(
        [grad_RO[start:end].t() @ x_RI[start:end] for start, end in pairwise([0, *ends_E.tolist()])]
    )


def _accumulated(grad_RO: torch.Tensor, x_RI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Multiply in float32; the function takes the left factor as it lies and transposes it itself."""
    import torch_npu

    sum_EOI = torch.zeros(
        len(ends_E), grad_RO.shape[1], x_RI.shape[1], dtype=torch.float32, device=x_RI.device
    )
    return torch_npu.npu_grouped_matmul_add_(sum_EOI, grad_RO.contiguous(), x_RI.contiguous(), ends_E)
