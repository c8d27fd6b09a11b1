"""The implementations the CPU offers beside the references."""

from collections.abc import Sequence

from portmoe.accelerator import Operations
from portmoe.backends.cpu import (
    compiled_cross_entropy,
    compiled_dispatch,
    compiled_expert_ffn,
    compiled_router,
    compiled_rows,
)
from portmoe.ops import bag_dispatch, buffered_expert_ffn, torch_native
from portmoe.ops.operation import Implementation


class CpuOperations(Operations):
    """What is written for CPUs, then torch's own fast paths."""

    def implementations(self) -> Sequence[Implementation]:
        return [
            *compiled_dispatch.ALL,
            *bag_dispatch.ALL,
            *compiled_rows.ALL,
            *compiled_router.ALL,
            *compiled_expert_ffn.ALL,
            *buffered_expert_ffn.ALL,
            *compiled_cross_entropy.ALL,
            *torch_native.ALL,
        ]
