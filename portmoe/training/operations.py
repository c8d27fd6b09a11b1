"""The run's choice of operations, the same on every rank."""

from collections.abc import Callable
from typing import Any

import torch

from portmoe.accelerator import Accelerator
from portmoe.config import Config
from portmoe.ops import OPERATIONS, OpTable, choose
from portmoe.ops.timings import Timings, cache_file
from portmoe.parallel.layout import Layout
from portmoe.parallel.workload import call_sites


def choose_operations(
    config: Config,
    layout: Layout,
    accelerator: Accelerator,
    device: torch.device,
    rank: int,
    broadcast: Callable[[Any], Any],
    log: Callable[[str], None],
) -> OpTable:
    """Choose for this run. With ``ops.select: measure`` rank 0 measures and all ranks go by its timings.

    Args:
        broadcast: gives every rank rank 0's value; a collective call.
    """

    def chosen(timings: Timings | None = None) -> OpTable:
        offered = accelerator.ops.implementations()
        return choose(OPERATIONS, offered, call_sites(config, layout, device), config, log, timings)

    if config.ops.select != "measure":
        return chosen()
    name, synchronize = accelerator.device.name(), accelerator.device.synchronize
    if rank:
        return chosen(Timings(name, broadcast(None), synchronize=synchronize))
    timings = Timings.load(name, cache_file(), log, synchronize)
    try:
        return chosen(timings)
    finally:  # the others wait for this, also where the choice failed
        broadcast(timings.known)
        timings.save(log)
