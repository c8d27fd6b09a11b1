"""How many of the machine's cores this process may use."""

import os


def usable_cores() -> int:
    """Cores the scheduler lets this process use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
