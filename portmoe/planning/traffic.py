"""Counting what a rank communicates: calls and bytes by kind of collective and by group."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from portmoe.parallel.mesh import Meshes

# torch's operations, of its eager and of its functional collectives → kind
KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "send": "send",
    "recv_": "receive",
}


@dataclass
class Traffic:
    """What one rank communicates, by (kind, name of the process group).

    ``bytes`` counts the whole buffer: what was gathered, what is reduced or exchanged, what is sent.
    """

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, kind: str, group: str, size: int, calls: int = 1) -> None:
        """``calls`` calls of ``size`` bytes each."""
        self.calls[kind, group] += calls
        self.bytes[kind, group] += calls * size

    def add_all(self, other: "Traffic", times: int = 1) -> None:
        for key, calls in other.calls.items():
            self.calls[key] += calls * times
            self.bytes[key] += other.bytes[key] * times

    def rows(self, meshes: Meshes) -> Iterator[tuple[str, str, int, int]]:
        """(kind, group, calls, bytes) for every kind and group of the meshes, named by its dimension."""
        names = _names_and_sizes(meshes)
        named = {(kind, *names.get(group, ("", 0))): (kind, group) for kind, group in self.calls}
        for kind, name, size in sorted(named):
            if size > 1:  # nothing leaves the rank otherwise
                key = named[kind, name, size]
                yield kind, f"{name}, {size} ranks", self.calls[key], self.bytes[key]


class Counted(TorchDispatchMode):
    """Counts all collectives called inside a ``with`` block into ``traffic``."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            kind = KINDS.get(function._schema.name.partition("::")[2])
            if kind is not None:
                # of an operation's buffers the whole one is the largest: gathered, or not yet scattered
                size = max(_bytes(value) for value in (*args, result))
                self.traffic.add(kind, _group(args), size)
        return result


def _names_and_sizes(meshes: Meshes) -> dict[str, tuple[str, int]]:
    """A process group's own name → the dimension of a mesh it is, and its size."""
    names = {}
    # equal groups are one, and have the name of the last
    around = [meshes.ring, meshes.heads] if meshes.ring is not None else []
    for mesh in (meshes.root, *around, meshes.expert_data, meshes.expert, meshes.data):
        for dimension in mesh.mesh_dim_names:
            group = mesh.get_group(dimension)
            names[group.group_name] = (dimension, group.size())
    return names


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _group(args: tuple) -> str:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).group_name
    return next(arg for arg in reversed(args) if isinstance(arg, str))
