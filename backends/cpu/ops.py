"""The implementations the CPU offers beside the references."""

from collections.abc import Sequence

from portmoe.accelerator import Operations
from portmoe.backends.cpu import (
    attention,
    bag_dispatch,
    buffered_expert_ffn,
    cross_entropy,
    dispatch,
    expert_ffn,
    linear,
    router,
    rows,
)
from portmoe.backends.torch import ops as torch_ops
from portmoe.ops.operation import Implementation

OWN = (
    *dispatch.ALL,
    *bag_dispatch.ALL,
    *rows.ALL,
    *router.ALL,
    *linear.ALL,
    *expert_ffn.ALL,
    *buffered_expert_ffn.ALL,
    *cross_entropy.ALL,
    *attention.ALL,
)
NOT_FOR_HOSTS = (
    torch_ops.CROSS_ENTROPY_CHUNKED,  # its slices are an accelerator's
    torch_ops.ATTENTION_BLOCKS,  # the kernel for hosts takes all it does
)


class CpuOperations(Operations):
    """What is written for CPUs, then torch's own fast paths."""

    def implementations(self) -> Sequence[Implementation]:
        return [*OWN, *(i for i in torch_ops.ALL if i not in NOT_FOR_HOSTS)]
