"""From a profile's events to parts of the model: whose time, and whose memory.

An event belongs to the innermost mark around it (see ``spans``). A backward node lies in no mark: it
belongs to where the forward operation of the same thread and sequence number belongs. What c10d and the
sharding engine do is communication, their copies included.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch.autograd.profiler_util import FunctionEvent

from portmoe.profiling.spans import PREFIX

COMMUNICATION, OTHER = "communication", "other"
ENGINES = ("c10d::", "_c10d_functional::", "FSDP::", "fsdp::")
BACKWARD_NODE = "autograd::engine::evaluate_function: "


@dataclass
class Usage:
    """The time and memory of one part, summed over the profiled steps."""

    forward: float = 0.0  # seconds, also of what has no backward pass
    backward: float = 0.0
    allocated: int = 0  # bytes its operations allocated
    kept: int = 0  # bytes its forward passes left allocated, results included

    @property
    def seconds(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


def attribute(events: Iterable[FunctionEvent], on_host: bool) -> dict[str, Usage]:
    """Part → usage.

    Args:
        on_host: the host computes, and the time that counts is its own; otherwise that of the kernels the
            events launched.
    """
    events = [event for event in events if not event.is_async and event.name != "[memory]"]
    origins = _origins(events)
    usages: dict[str, Usage] = {}
    for event in events:
        part, backward = _place(event, origins)
        usage = usages.setdefault(part, Usage())
        microseconds = event.self_cpu_time_total if on_host else event.self_device_time_total
        memory = event.self_cpu_memory_usage if on_host else event.self_device_memory_usage
        if backward:
            usage.backward += microseconds / 1e6
        else:
            usage.forward += microseconds / 1e6
            usage.kept += memory
        usage.allocated += max(0, memory)
    return usages


def _origins(events: Iterable[FunctionEvent]) -> dict[tuple[int, int], str]:
    """(thread, sequence number) → part, of the forward operations.

    Operations without a gradient show the number of the next one that has: the last to show it took it.
    """
    origins = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        part = _marked_part(event)
        if part is not None and event.sequence_nr >= 0:
            origins[event.thread, event.sequence_nr] = part
    return origins


def _place(event: FunctionEvent, origins: dict[tuple[int, int], str]) -> tuple[str, bool]:
    """The event's part, and whether it runs in the backward pass."""
    node = _backward_node(event)
    part = _marked_part(event)
    if part is None and node is not None:
        # torch leaves the number out of some nodes; what they run has it.
        numbered = next((e for e in (node, *node.cpu_children) if e.sequence_nr >= 0), node)
        part = origins.get((numbered.fwd_thread, numbered.sequence_nr))
    return part or OTHER, node is not None


def _marked_part(event: FunctionEvent | None) -> str | None:
    """The innermost part that is marked around the event, itself included."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name.startswith(ENGINES):
            return COMMUNICATION
        event = event.cpu_parent
    return None


def _backward_node(event: FunctionEvent | None) -> FunctionEvent | None:
    while event is not None and not event.name.startswith(BACKWARD_NODE):
        event = event.cpu_parent
    return event
