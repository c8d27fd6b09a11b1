"""Which rank runs on which host and device, as shown at the start of a run."""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.distributed as dist

from portmoe.launch.ranks import Ranks


def gather_places(ranks: Ranks, device: torch.device, group: dist.ProcessGroup) -> list[tuple[str, str]]:
    """Host and device of every rank, in the order of the ranks; all ranks call it, on a group of all."""
    places: list[tuple[str, str] | None] = [None] * ranks.world_size
    dist.all_gather_object(places, (ranks.host, str(device)), group=group)
    return [place for place in places if place is not None]


def placement(places: Sequence[tuple[str, str]]) -> str:
    """A line for each run of neighbouring ranks on one host: ``0-7 on node3: xyz:0-7``."""
    lines, first = [], 0
    for host, here in groupby(places, key=lambda place: place[0]):
        devices = [device for _, device in here]
        last = first + len(devices) - 1
        span = f"{first}-{last}" if last > first else f"{first}"
        lines.append(f"{span} on {host}: {_devices(devices)}")
        first = last + 1
    return "\n".join(lines)


def _devices(devices: Sequence[str]) -> str:
    """``xyz:0-7`` where they count up, else each by name.

    Ranks to which the launcher shows one device each all call it by the same name: ``xyz:0 each``.
    """
    if len(devices) == 1:
        return devices[0]
    if len(set(devices)) == 1:
        return f"{devices[0]} each"
    kind, _, start = devices[0].partition(":")
    if start.isdigit() and list(devices) == [f"{kind}:{int(start) + i}" for i in range(len(devices))]:
        return f"{devices[0]}-{int(start) + len(devices) - 1}"
    return " ".join(devices)
