"""The implementations NVIDIA GPUs offer beside the references."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from portmoe.accelerator import Operations
from portmoe.backends.cuda import tutel
from portmoe.backends.cuda.varlen import ATTENTION_VARLEN
from portmoe.backends.kernels import liger
from portmoe.backends.kernels.ops import TRITON
from portmoe.ops import torch_native
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload


class CudaOperations(Operations):
    """Triton kernels, then torch's own fast paths, then what is optional and was measured by nobody here.

    Tutel's gating comes first: it is considered only where moe.use_tutel asks for it.
    """

    def implementations(self) -> Sequence[Implementation]:
        native = (GROUPED_MM if i is torch_native.EXPERT_FFN_GROUPED_MM else i for i in torch_native.ALL)
        optional = (tutel.DISPATCH, tutel.COMBINE, liger.RMS_NORM, liger.CROSS_ENTROPY)
        return [tutel.GATING, *TRITON, ATTENTION_VARLEN, *native, *optional]


def _grouped_mm_supports(workload: Workload) -> str | None:
    if workload.dtype != torch.bfloat16:
        return f"grouped_mm's kernel for this device takes bfloat16 only, not {workload.dtype}"
    return torch_native.EXPERT_FFN_GROUPED_MM.supports(workload)


GROUPED_MM = replace(torch_native.EXPERT_FFN_GROUPED_MM, supports=_grouped_mm_supports)
