"""The processor and the cores this process may use, found without torch."""

import os
import platform
from pathlib import Path

from portmoe.accelerator import Probe
from portmoe.backends import extension

CPUINFO = Path("/proc/cpuinfo")


def software() -> Probe:
    """Nothing but torch is needed; the processor is always there."""
    probe = Probe({"processor": processor(), "cores": str(usable_cores())}, present=True)
    extension.look(probe)
    return probe


def processor() -> str:
    """The processor's model name."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:  # no /proc: macOS, Windows
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def usable_cores() -> int:
    """Cores the scheduler lets this process use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
