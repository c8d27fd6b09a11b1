"""Whether this process waits for cores that others keep busy, as the kernel's scheduler counts it."""

import time
from collections.abc import Callable
from pathlib import Path

EVERY = 10.0  # seconds between two looks
TOO_MUCH = 0.5  # of the time in which a thread could run


class BusyCores:
    """Notices once that the threads of this process wait more than they run; see proc(5), ``schedstat``.

    Says nothing where the kernel does not count it.
    """

    def __init__(
        self, tasks: Path = Path("/proc/self/task"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tasks, self._clock = tasks, clock
        self._looked, self._before = clock(), self._counts()
        self._told = False

    def look(self) -> str | None:
        """Return what to say about it, where there is something, once; to be called now and then."""
        if self._told or self._clock() - self._looked < EVERY:
            return None
        counts = self._counts()
        ran, waited = (now - before for now, before in zip(counts, self._before, strict=True))
        self._looked, self._before = self._clock(), counts
        share = waited / (ran + waited) if ran + waited > 0 else 0.0
        if share <= TOO_MUCH:
            return None
        self._told = True
        return (
            f"the cores are busy: for {share:.0%} of the time in which this process could compute it waited "
            "for one. Other processes use them, or it has more threads than cores (OMP_NUM_THREADS); tokens "
            "per second are a fraction of what this machine can do"
        )

    def _counts(self) -> tuple[int, int]:
        """Nanoseconds for which all threads together ran, and for which they waited for a core."""
        ran = waited = 0
        try:
            for task in self._tasks.iterdir():
                fields = (task / "schedstat").read_text().split()
                ran, waited = ran + int(fields[0]), waited + int(fields[1])
        except (OSError, ValueError, IndexError):  # a thread may end meanwhile
            return getattr(self, "_before", (0, 0))
        return ran, waited
