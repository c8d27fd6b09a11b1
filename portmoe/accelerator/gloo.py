"""Groups of gloo's with one worker thread each.

torch gives a group two, and both note the last collective's name in one string, without a lock. A name of
more than 15 characters lies on the heap, such as ALLGATHER_COALESCED, by which DTensors are gathered: where
another collective follows at once, one worker frees what the other writes to. A run then ends now and then
with "malloc(): unaligned tcache chunk detected", or worse, goes on. Seen with torch 2.13.0; AddressSanitizer
names the line. A group's collectives start in the same order on all ranks, so that to carry them out in that
order costs little.
"""

import os
from datetime import timedelta
from functools import cache

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout


@cache
def use_one_worker() -> None:
    """Give every group of gloo's made from now on in this process, by whomever, a single worker.

    torch makes its own groups, those of a device mesh among them, with no way to pass an option.
    """
    if not dist.is_gloo_available():
        return
    group_type = dist.ProcessGroupGloo
    made_by_torch = group_type.__init__

    def init(
        self: "dist.ProcessGroupGloo",
        store: dist.Store,
        rank: int,
        size: int,
        timeout: "timedelta | dist.ProcessGroupGloo.Options" = default_pg_timeout,
        options: "dist.ProcessGroupGloo.Options | None" = None,
    ) -> None:
        if isinstance(timeout, group_type._Options):  # torch takes either in this place
            options = timeout
        elif options is None:
            options = group_type._Options()
            options._timeout, options._devices = timeout, _devices()
        options._threads = 1
        made_by_torch(self, store, rank, size, options)

    group_type.__init__ = init


def _devices() -> "list[dist.ProcessGroupGloo.Device]":
    """The network interfaces torch would take: those of GLOO_SOCKET_IFNAME, or the one of the host's name."""
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if not interfaces:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in interfaces]
