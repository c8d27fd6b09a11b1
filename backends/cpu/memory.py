"""Memory of a CPU process, as the operating system counts it.

torch keeps no statistics of CPU tensors, so the figures are those of the whole process: resident
set and its high-water mark, interpreter and libraries included.
"""

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

from portmoe.accelerator import Memory
from portmoe.accelerator.host_memory import host_memory

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)'s names for its settings
LARGEST_KEPT = 2**30  # bytes; what is larger goes back to the system at once


class CpuMemory(Memory):
    """Resident memory of this process, in bytes."""

    def allocated(self) -> int:
        """Resident set now; where there is no /proc, its peak."""
        return _status("VmRSS") or _peak_of_process()

    def peak(self) -> int:
        """High-water mark of the resident set since the last ``reset_peak()``."""
        return _status("VmHWM") or _peak_of_process()

    def reset_peak(self) -> None:
        """Lower the high-water mark to the present resident set, where the kernel lets us."""
        try:
            CLEAR_REFS.write_text("5", encoding="ascii")  # proc(5): 5 resets VmHWM
        except OSError:
            return  # the mark then covers the whole life of the process

    def keep_freed(self) -> None:
        """Keep it by the C library's settings, which hold for the whole process.

        Otherwise every buffer above 32 MiB is mapped anew, and every page of it cleared on first use, in
        every step: a fifth of the time of an MoE layer with many experts. Settings in the environment win.
        """
        if platform.libc_ver()[0] != "glibc" or any(key.startswith("MALLOC_") for key in os.environ):
            return
        for setting in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(setting, LARGEST_KEPT)

    def total(self) -> int:
        """What the machine has, or the container or job may use of it; every rank here shares this."""
        return host_memory().total


def _status(key: str) -> int:
    """A size from /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _peak_of_process() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
