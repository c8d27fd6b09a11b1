"""The NPU backend: Ascend devices through torch_npu and HCCL."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portmoe.accelerator import Accelerator, Preflight


def accelerator() -> "Accelerator":
    """The entry point of the group ``portmoe.backends``."""
    from portmoe.accelerator import Accelerator
    from portmoe.backends.npu.collectives import NpuCollectives
    from portmoe.backends.npu.device import NpuDevice
    from portmoe.backends.npu.memory import NpuMemory
    from portmoe.backends.npu.ops import NpuOperations

    return Accelerator("npu", NpuDevice(), NpuCollectives(), NpuOperations(), NpuMemory())


def preflight() -> "Preflight":
    """What is known before torch is imported, which loads torch_npu by itself."""
    from portmoe.accelerator import Preflight
    from portmoe.backends.npu.probe import ENVIRONMENT, explain_failed_import, software

    return Preflight(software, ENVIRONMENT, explain_failed_import)
