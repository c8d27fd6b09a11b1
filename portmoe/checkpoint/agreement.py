"""What one rank or all do, with one outcome for all: no rank is left waiting for another that failed."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from portmoe.errors import PortmoeError, TrainingError


def on_first_rank(group: dist.ProcessGroup, work: Callable[[], Any]) -> Any:
    """Do ``work`` on rank 0 of the group; every rank gets its result or its error."""
    outcome: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = work()
        except PortmoeError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = TrainingError(f"the checkpoint folder cannot be used: {error}")
    dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def agree(group: dist.ProcessGroup, work: Callable[[], None]) -> None:
    """Do ``work`` on every rank; if it fails on any, every rank raises the lowest such rank's error."""
    mine: PortmoeError | None = None
    try:
        work()
    except PortmoeError as error:
        mine = error
    errors: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, mine, group=group)
    for error in errors:
        if error is not None:
            raise error
