"""The CUDA backend: NVIDIA GPUs through torch.cuda and NCCL."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portmoe.accelerator import Accelerator, Preflight


def accelerator() -> "Accelerator":
    """The entry point of the group ``portmoe.backends``."""
    from portmoe.accelerator import Accelerator
    from portmoe.backends.cuda.collectives import CudaCollectives
    from portmoe.backends.cuda.device import CudaDevice
    from portmoe.backends.cuda.memory import CudaMemory
    from portmoe.backends.cuda.ops import CudaOperations

    return Accelerator("cuda", CudaDevice(), CudaCollectives(), CudaOperations(), CudaMemory())


def preflight() -> "Preflight":
    """What is known before torch is imported."""
    from portmoe.accelerator import Preflight
    from portmoe.backends.cuda.probe import explain_failed_import, software

    return Preflight(software, explain=explain_failed_import)
