"""Which ranks are gone, asked by a rank whose collective failed and answered by all that still run.

A rank that lost a connection cannot tell whether the other end died, hangs, or lost one itself. So every
rank has a thread that looks into the store the ranks met in, and answers when a roll is called, whatever its
rank is waiting for at that moment. Ranks started by ``portmoe train --nproc`` need none of this: the process
that started them sees which one ended.
"""

import threading
import time

from torch.distributed.distributed_c10d import _get_default_store

from portmoe.launch.ranks import Ranks

_CALLED, _PRESENT, _GONE = (f"portmoe/roll-call/{key}" for key in ("called", "present", "gone"))


class RollCall:
    """One rank's answering thread. Create it once the default process group is there."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pause = 0.5 + ranks.world_size / 1000  # seconds; many ranks ask one store
        self._store = _get_default_store()  # of this start of the ranks alone
        self._gone: str | None = (
            None  # as some rank has found; kept here, for rank 0 may take the store along
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="portmoe-roll-call", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._closing.set()
        self._thread.join()

    def gone(self) -> list[int]:
        """The ranks that did not answer; takes some seconds. The same on all that ask."""
        try:
            if self._gone is None:
                self._store.set(_CALLED, "")
                deadline = time.monotonic() + 10 * self._pause
                while self._gone is None and time.monotonic() < deadline:
                    time.sleep(self._pause)
                if self._gone is None:
                    everyone = range(self._ranks.world_size)
                    absent = [rank for rank in everyone if not self._store.check([f"{_PRESENT}/{rank}"])]
                    self._store.set(_GONE, ",".join(map(str, absent)))
                    self._gone = self._store.get(_GONE).decode()
            if self._ranks.rank == 0:
                time.sleep(4 * self._pause)  # it may hold the store: the others read it first
        except (RuntimeError, OSError):
            self._gone = self._gone or "0"  # which held the store
        return [int(rank) for rank in self._gone.split(",") if rank]

    def _answer(self) -> None:
        answered = False
        while not self._closing.wait(self._pause):
            try:
                if not answered and self._store.check([_CALLED]):
                    self._store.set(f"{_PRESENT}/{self._ranks.rank}", "")
                    answered = True
                if answered and self._store.check([_GONE]):
                    self._gone = self._store.get(_GONE).decode()
                    return
            except (RuntimeError, OSError):
                return
