"""Memory of Intel GPUs. Untested on hardware."""

from portmoe.accelerator import Memory


class XpuMemory(Memory):
    """torch's caching allocator, by the generic calls."""
