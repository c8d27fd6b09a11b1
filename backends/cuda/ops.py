"""The implementations NVIDIA GPUs offer beside the references."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from portmoe.accelerator import Operations
from portmoe.backends.cuda import tutel
from portmoe.backends.cuda.attention import ATTENTION_FLASH
from portmoe.backends.cuda.varlen import ATTENTION_VARLEN
from portmoe.backends.torch import ops as torch_ops
from portmoe.backends.triton import liger
from portmoe.backends.triton.ops import TRITON
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload


class CudaOperations(Operations):
    """Triton kernels, then torch's own fast paths, then what is optional and was measured by nobody here.

    Tutel's gating comes first: it is considered only where moe.use_tutel asks for it.
    """

    def implementations(self) -> Sequence[Implementation]:
        torchs = (GROUPED_MM if i is torch_ops.EXPERT_FFN_GROUPED_MM else i for i in torch_ops.ALL)
        optional = (tutel.DISPATCH, tutel.COMBINE, liger.RMS_NORM, liger.CROSS_ENTROPY)
        return [tutel.GATING, *TRITON, ATTENTION_VARLEN, ATTENTION_FLASH, *torchs, *optional]


def _grouped_mm_supports(workload: Workload) -> str | None:
    if workload.dtype != torch.bfloat16:
        return f"grouped_mm's kernel for this device takes bfloat16 only, not {workload.dtype}"
    return torch_ops.EXPERT_FFN_GROUPED_MM.supports(workload)


GROUPED_MM = replace(torch_ops.EXPERT_FFN_GROUPED_MM, supports=_grouped_mm_supports)
