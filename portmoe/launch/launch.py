"""Opening the device, meeting the other ranks, and leaving them."""

import ctypes
import os
import signal
import socket
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from portmoe.accelerator import Accelerator
from portmoe.errors import BackendError
from portmoe.launch.address import with_known_address
from portmoe.launch.ranks import PARENT, Ranks

_PR_SET_PDEATHSIG = 1  # prctl(2)
_TICKETS = "portmoe/tickets"
_TORCHS_TIMEOUT = distributed_c10d._get_default_timeout


def start(accelerator: Accelerator, ranks: Ranks, timeout_seconds: int) -> torch.device:
    """Open this rank's device, meet the other ranks, create the default process group and try it.

    Raises:
        BackendError: the device cannot be opened, a rank did not arrive within ``timeout_seconds``
            (the message names the missing ones), or the first collective fails.
    """
    _die_with_parent()
    timeout = timedelta(seconds=timeout_seconds)
    # torch gives every later group a time-out of its own, and those of a mesh can be given no other.
    distributed_c10d._get_default_timeout = lambda backend: timeout
    device = accelerator.open(_device_index(accelerator, ranks))
    store = _meet(ranks, timeout)
    try:
        accelerator.collectives.init(device, ranks.rank, ranks.world_size, timeout, store)
        present = torch.ones(1, device=device)
        dist.all_reduce(present)
    except RuntimeError as error:
        raise BackendError(
            f"the first collective ({accelerator.collectives.backend}) failed on rank {ranks.rank} "
            f"({ranks.host}, {device}): {_first_line(error)}; run `portmoe check-env` on this machine"
        ) from error
    if present.item() != ranks.world_size:
        raise BackendError(
            f"the first all-reduce gave {present.item():g} instead of {ranks.world_size} on rank "
            f"{ranks.rank} ({ranks.host}, {device}); run `portmoe check-env` on this machine"
        )
    return device


def stop() -> None:
    """Leave the process group."""
    distributed_c10d._get_default_timeout = _TORCHS_TIMEOUT
    if dist.is_initialized():
        dist.destroy_process_group()


def _device_index(accelerator: Accelerator, ranks: Ranks) -> int:
    """The local rank, unless the launcher shows each rank only a device of its own."""
    count = accelerator.device.count()
    if accelerator.device.shared or ranks.local_rank < count:
        return ranks.local_rank
    if ranks.source in ("srun", "mpi") and count == 1:
        return 0
    raise BackendError(
        f"rank {ranks.rank} ({ranks.host}) needs {accelerator.name} device {ranks.local_rank}, and this "
        f"process sees {count}; start at most {count} rank(s) on this machine, or make more devices visible"
    )


def _die_with_parent() -> None:
    """Have the kernel end this rank when the process that spawned it is killed.

    An orphan would train on and hold the run directory against the resumed run.
    """
    parent = os.environ.get(PARENT)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it was killed before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _meet(ranks: Ranks, timeout: timedelta) -> dist.Store:
    """The store all ranks share, once all of them have come."""
    if ranks.world_size == 1:
        return dist.HashStore()
    deadline = time.monotonic() + timeout.total_seconds()
    ranks = with_known_address(ranks, os.environ)
    try:
        if ranks.rank > 0:
            _await_first_rank(ranks, deadline)
        return _await_all(_connect(ranks, timeout), ranks, deadline)
    except (OSError, dist.DistError) as error:
        address, port = ranks.variables
        raise BackendError(
            f"rank {ranks.rank} ({ranks.host}) cannot reach rank 0 at {_meeting_point(ranks)}: "
            f"{_first_line(error)}; check that rank 0 was started, that {address} is its host and that "
            f"{port} is free and open there"
        ) from error


def _meeting_point(ranks: Ranks) -> str:
    return f"{ranks.master_address}:{ranks.master_port}"


def _await_first_rank(ranks: Ranks, deadline: float) -> None:
    """Return when rank 0 listens. (torch's own client would wait twice as long and log its C++ stack.)"""
    while True:
        try:
            socket.create_connection((ranks.master_address, ranks.master_port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _connect(ranks: Ranks, timeout: timedelta) -> dist.Store:
    if ranks.source == "torchrun":
        # The agent may hold the store itself: torch knows.
        rendezvous = dist.rendezvous("env://", rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
        return next(rendezvous)[0]
    return dist.TCPStore(
        ranks.master_address,
        ranks.master_port,
        ranks.world_size,
        is_master=ranks.rank == 0,
        timeout=timeout,
        wait_for_workers=False,
    )


def _await_all(store: dist.Store, ranks: Ranks, deadline: float) -> dist.Store:
    """Return a part of the store that is this start's alone, when every rank has said that it is here.

    Whoever runs out of time first names the missing ranks to all, and rank 0, which may hold the
    store, stays until the others have had time to read it.
    """
    pause = 0.05 + ranks.world_size / 2000  # seconds; many ranks ask one store
    hosted = _RendezvousRound(store) if ranks.rank == 0 else None
    ours = dist.PrefixStore(hosted.round if hosted else _join_round(store, ranks, deadline, pause), store)
    ours.set(f"arrived/{ranks.rank}", ranks.host)
    if ours.add("arrived", 1) == ranks.world_size:
        ours.set("everyone", "")
    while not ours.check(["everyone"]):
        if hosted:
            hosted.answer_tickets()
        if time.monotonic() > deadline and not ours.check(["missing"]):
            absent = [rank for rank in range(ranks.world_size) if not ours.check([f"arrived/{rank}"])]
            ours.set("missing", _listed(absent))
        if ours.check(["missing"]):
            if hosted:
                time.sleep(4 * pause)
            raise _missing(ours.get("missing").decode(), ranks)
        time.sleep(pause)
    return ours


class _RendezvousRound:
    """Rank 0's side of the rendezvous: an elastic agent may keep one store over restarts, with all that the
    ranks of former starts wrote into it. So each start has a round, and every rank takes a ticket,
    whose number never comes again, and is told the round by it."""

    def __init__(self, store: dist.Store) -> None:
        self.round = f"portmoe/{uuid.uuid4().hex}"
        self._store = store
        self._answered = 0

    def answer_tickets(self) -> None:
        """Answer every ticket taken since the last call."""
        taken = self._store.add(_TICKETS, 0)
        for ticket in range(self._answered + 1, taken + 1):
            self._store.set(f"{_TICKETS}/{ticket}", self.round)
        self._answered = taken


def _join_round(store: dist.Store, ranks: Ranks, deadline: float, pause: float) -> str:
    """The other ranks' side: take a ticket and wait to be told the round."""
    answer = f"{_TICKETS}/{store.add(_TICKETS, 1)}"
    while not store.check([answer]):
        if time.monotonic() > deadline:
            raise _missing("0", ranks)
        time.sleep(pause)
    return store.get(answer).decode()


def _missing(named: str, ranks: Ranks) -> BackendError:
    return BackendError(
        f"of {ranks.world_size} ranks these did not reach {_meeting_point(ranks)} in time: {named}; check "
        "that all were started and can reach this address, or raise run.collective_timeout"
    )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
