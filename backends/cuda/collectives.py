"""Collectives between NVIDIA GPUs."""

from portmoe.accelerator import Collectives


class CudaCollectives(Collectives):
    """NCCL. Its watchdog, on by default, ends a process whose collective has timed out."""

    backend = "nccl"
