"""The implementations Intel GPUs offer beside the references. Untested on hardware."""

from collections.abc import Sequence

from portmoe.accelerator import Operations
from portmoe.backends.torch import ops as torch_ops
from portmoe.backends.triton import liger
from portmoe.backends.triton.ops import TRITON
from portmoe.ops.operation import Implementation

# torch plans a grouped_mm for these devices for 2.15.
LACKING = (torch_ops.EXPERT_FFN_GROUPED_MM,)


class XpuOperations(Operations):
    """Triton kernels where triton has the compiler, torch's own fast paths, then liger-kernel's."""

    def implementations(self) -> Sequence[Implementation]:
        torchs = (i for i in torch_ops.ALL if i not in LACKING)
        return [*TRITON, *torchs, liger.RMS_NORM, liger.CROSS_ENTROPY]
