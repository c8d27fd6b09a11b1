"""The implementations this vendor offers beside the references, the preferred one first."""

from collections.abc import Sequence

import torch

from portmoe.accelerator import Operations
from portmoe.backends.torch import ops as torch_ops
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload
from portmoe_newvendor import fused

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _rms_norm_supports(workload: Workload) -> str | None:
    """None, or why this workload has to take another implementation."""
    if workload.dtype not in DTYPES:
        return f"the fused rms_norm has no {workload.dtype}"
    return None


class NewvendorOperations(Operations):
    """The vendor's own, then torch's fast paths that its plug-in has kernels for."""

    def implementations(self) -> Sequence[Implementation]:
        own = Implementation("rms_norm", "newvendor", fused.rms_norm, _rms_norm_supports)
        return [own, *torch_ops.ALL]
