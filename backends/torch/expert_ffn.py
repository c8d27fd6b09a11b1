"""The experts' networks: one after the other, or as grouped products."""

from typing import Any

import torch
import torch.nn.functional as F

from portmoe.backends.torch.swiglu import swiglu
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload


def _expert_loop(
    x_ECH: torch.Tensor, w1_EFH: torch.Tensor, w3_EFH: torch.Tensor, w2_EHF: torch.Tensor
) -> torch.Tensor:
    # unbind, not w[e]: indexing would fill a whole weight's gradient per expert.
    experts = zip(*(t.unbind(0) for t in (x_ECH, w1_EFH, w3_EFH, w2_EHF)), strict=True)
    return torch.stack([_ffn(*expert) for expert in experts])


def _expert_loop_ragged(
    x_RH: torch.Tensor,
    ends_E: torch.Tensor,
    w1_EFH: torch.Tensor,
    w3_EFH: torch.Tensor,
    w2_EHF: torch.Tensor,
) -> torch.Tensor:
    lengths = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    weights = (t.unbind(0) for t in (w1_EFH, w3_EFH, w2_EHF))
    return torch.cat([_ffn(*expert) for expert in zip(x_RH.split(lengths), *weights, strict=True)])


def _ffn(x_CH: torch.Tensor, w1_FH: torch.Tensor, w3_FH: torch.Tensor, w2_HF: torch.Tensor) -> torch.Tensor:
    return F.linear(swiglu(F.linear(x_CH, w1_FH), F.linear(x_CH, w3_FH)), w2_HF)


def _expert_grouped_mm(
    x_RH: torch.Tensor,
    ends_E: torch.Tensor,
    w1_EFH: torch.Tensor,
    w3_EFH: torch.Tensor,
    w2_EHF: torch.Tensor,
) -> torch.Tensor:
    ends = ends_E.to(torch.int32)
    gate_RF = F.grouped_mm(x_RH, w1_EFH.transpose(1, 2), offs=ends)
    up_RF = F.grouped_mm(x_RH, w3_EFH.transpose(1, 2), offs=ends)
    y_RH = F.grouped_mm(swiglu(gate_RF, up_RF), w2_EHF.transpose(1, 2), offs=ends)
    return _DenseGradient.apply(y_RH)


class _DenseGradient(torch.autograd.Function):
    """The identity whose gradient is laid out densely: grouped_mm refuses an expanded one."""

    @staticmethod
    def forward(ctx: Any, y_RH: torch.Tensor) -> torch.Tensor:
        return y_RH.view_as(y_RH)

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> torch.Tensor:
        return grad_RH.contiguous()


def _grouped_mm_supports(workload: Workload) -> str | None:
    if workload.dtype == torch.float64:
        return "grouped_mm has no float64 kernel"
    for name, width in (("hidden", workload.hidden), ("ffn_width", workload.ffn_width)):
        if width * workload.dtype.itemsize % 16:
            return (
                f"grouped_mm needs rows of a multiple of 16 bytes, and {name} is {width} × {workload.dtype}"
            )
    return None


EXPERT_FFN_LOOP = Implementation("expert_ffn", "loop", _expert_loop)
EXPERT_FFN_RAGGED_LOOP = Implementation("expert_ffn_ragged", "loop", _expert_loop_ragged)
EXPERT_FFN_GROUPED_MM = Implementation(
    "expert_ffn_ragged", "grouped_mm", _expert_grouped_mm, _grouped_mm_supports
)
