"""The processor and the cores this process may use, found without torch."""

import platform
from pathlib import Path

from portmoe.accelerator import Probe
from portmoe.backends import extension
from portmoe.cores import usable_cores

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
