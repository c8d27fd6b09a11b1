"""The CPU backend: always there, and the one the others are compared with."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portmoe.accelerator import Accelerator, Preflight


def accelerator() -> "Accelerator":
    """The entry point of the group ``portmoe.backends``."""
    from portmoe.accelerator import Accelerator
    from portmoe.backends.cpu.collectives import CpuCollectives
    from portmoe.backends.cpu.device import CpuDevice
    from portmoe.backends.cpu.memory import CpuMemory
    from portmoe.backends.cpu.ops import CpuOperations

    return Accelerator("cpu", CpuDevice(), CpuCollectives(), CpuOperations(), CpuMemory(), priority=0)


def preflight() -> "Preflight":
    """What is known before torch is imported."""
    from portmoe.accelerator import Preflight
    from portmoe.backends.cpu.probe import software

    return Preflight(software)
