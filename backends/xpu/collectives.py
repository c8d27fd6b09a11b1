"""Collectives between Intel GPUs. Untested on hardware."""

from portmoe.accelerator import Collectives


class XpuCollectives(Collectives):
    """XCCL, oneCCL inside torch."""

    backend = "xccl"
