"""The XPU backend: Intel GPUs through torch.xpu and XCCL."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portmoe.accelerator import Accelerator, Preflight


def accelerator() -> "Accelerator":
    """The entry point of the group ``portmoe.backends``."""
    from portmoe.accelerator import Accelerator
    from portmoe.backends.xpu.collectives import XpuCollectives
    from portmoe.backends.xpu.device import XpuDevice
    from portmoe.backends.xpu.memory import XpuMemory
    from portmoe.backends.xpu.ops import XpuOperations

    return Accelerator("xpu", XpuDevice(), XpuCollectives(), XpuOperations(), XpuMemory())


def preflight() -> "Preflight":
    """What is known before torch is imported."""
    from portmoe.accelerator import Preflight
    from portmoe.backends.xpu.probe import ENVIRONMENT, explain_failed_import, software

    return Preflight(software, ENVIRONMENT, explain_failed_import)
