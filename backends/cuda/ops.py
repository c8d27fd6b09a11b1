"""The implementations NVIDIA GPUs offer beside the references."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from portmoe.accelerator import Operations
from portmoe.accelerator.probing import describe
from portmoe.ops import torch_native
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload


class CudaOperations(Operations):
    """Triton kernels, then torch's own fast paths."""

    def implementations(self) -> Sequence[Implementation]:
        native = (GROUPED_MM if i is torch_native.EXPERT_FFN_GROUPED_MM else i for i in torch_native.ALL)
        return [*TRITON, *native]


def _swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    from portmoe.backends.cuda.triton_swiglu import swiglu

    return swiglu(gate_TF, up_TF)


def _dispatch(x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    from portmoe.backends.cuda.triton_rows import dispatch

    return dispatch(x_SH, row_KS, rows)


def _combine(y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
    from portmoe.backends.cuda.triton_rows import combine

    return combine(y_RH, row_KS, weight_KS)


def _triton_supports(workload: Workload) -> str | None:
    if workload.dtype == torch.float64:
        return "the kernels compute in float32"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation must not stop the run
        return f"triton does not load: {describe(error)}"
    return None


TRITON = (
    Implementation("swiglu", "triton", _swiglu, _triton_supports),
    Implementation("dispatch", "triton", _dispatch, _triton_supports),
    Implementation("combine", "triton", _combine, _triton_supports),
)


def _grouped_mm_supports(workload: Workload) -> str | None:
    if workload.dtype != torch.bfloat16:
        return f"grouped_mm's kernel for this device takes bfloat16 only, not {workload.dtype}"
    return torch_native.EXPERT_FFN_GROUPED_MM.supports(workload)


GROUPED_MM = replace(torch_native.EXPERT_FFN_GROUPED_MM, supports=_grouped_mm_supports)
