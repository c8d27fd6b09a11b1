"""The implementations Intel GPUs offer beside the references. Untested on hardware."""

from collections.abc import Sequence

from portmoe.accelerator import Operations
from portmoe.backends.kernels import liger
from portmoe.backends.kernels.ops import TRITON
from portmoe.ops import torch_native
from portmoe.ops.operation import Implementation

# torch plans a grouped_mm for these devices for 2.15.
LACKING = (torch_native.EXPERT_FFN_GROUPED_MM,)


class XpuOperations(Operations):
    """Triton kernels where triton has the compiler, torch's own fast paths, then liger-kernel's."""

    def implementations(self) -> Sequence[Implementation]:
        native = (i for i in torch_native.ALL if i not in LACKING)
        return [*TRITON, *native, liger.RMS_NORM, liger.CROSS_ENTROPY]
