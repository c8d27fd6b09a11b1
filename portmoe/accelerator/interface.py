"""The accelerator interface: what a vendor writes, about a page.

``torch.accelerator`` already covers device, stream, event and memory statistics of every backend
torch knows, in-tree or plugged in. The base classes delegate to it; a backend overrides what its
stack does differently and adds what torch has no interface for: the collective backend, the
environment, the fused operations, the probe.

A backend package exposes ``accelerator() -> Accelerator`` through the entry-point group
``portmoe.backends``. Calling it must not import the vendor's modules: they are imported inside
functions only. What must be known before torch is imported goes into an optional ``preflight()``
beside it (see ``preflight.py``).
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from portmoe.accelerator import gloo
from portmoe.accelerator.probing import Probe, describe
from portmoe.errors import ConfigError

if TYPE_CHECKING:
    from portmoe.ops.operation import Implementation

PEAK_VARIABLE = "PORTMOE_PEAK_TFLOPS"


def set_unset(variables: Mapping[str, str]) -> None:
    """Set the environment variables that the user has not set."""
    for key, value in variables.items():
        os.environ.setdefault(key, value)


def is_host(device_type: str) -> bool:
    """Whether tensors of this type are the host's own. What follows from it, a ``Device`` says."""
    return device_type == "cpu"


class Device:
    """The device part: finding it, opening it, making it reproducible."""

    type: str  # torch's device type, as in torch.device(type, index)
    shared: bool = False  # several ranks may open the same device
    advice: str = "install the driver and a torch that supports the device"  # where torch sees none

    @property
    def on_host(self) -> bool:
        """The host itself computes: an operation has ended when its call returns, by the host's clock."""
        return is_host(self.type)

    def probe(self) -> Probe:
        """Look for the device and its software. Never raises: every exception becomes a ``Problem``.

        Torch has the last word: where it sees a device, nothing can be missing, and only the warnings of
        ``software`` are kept; where it sees none, ``software`` says why, if it knows.
        """
        found, software = Probe(), Probe()
        try:
            self.find_devices(found)
        except Exception as error:
            found.fail(f"asking torch for {self.type} devices raised {describe(error)}", self.advice)
        try:
            software = self.software()
        except Exception as error:
            software.warn(f"looking for the software of {self.type} raised {describe(error)}", self.advice)
        if found.usable:
            software.problems = [problem for problem in software.problems if not problem.fatal]
        elif not software.usable:
            found.problems.clear()
        software.extend(found)
        return software

    def software(self) -> Probe:
        """Versions of what lies between torch and the chip, and what is missing there."""
        return Probe()

    def find_devices(self, probe: Probe) -> None:
        """Add what torch sees of this device type to ``probe``."""
        current = torch.accelerator.current_accelerator()
        if current is None or current.type != self.type:
            other = f"; its accelerator is {current.type!r}" if current else ""
            probe.fail(
                f"the installed torch {torch.__version__} has no {self.type} support{other}", self.advice
            )
        elif not self.count():
            probe.fail(f"torch sees no {self.type} device", self.advice)
        else:
            probe.present = True
            probe.facts["devices"] = f"{self.count()} × {self.name()}"

    def environment(self) -> Mapping[str, str]:
        """Variables the driver stack reads when the device is first used."""
        return {}

    def open(self, local_rank: int) -> torch.device:
        """Prepare device ``local_rank`` for this process and make it the current one.

        Comes before ``Collectives.init``, so that no rank creates a context on another's device.
        """
        torch.accelerator.set_device_index(local_rank)
        return torch.device(self.type, local_rank)

    def count(self) -> int:
        """How many devices this process can see; 0 where there is none."""
        return torch.accelerator.device_count()

    def name(self) -> str:
        """The model name of the current device, as the vendor prints it."""
        return torch.get_device_module(self.type).get_device_name()

    def synchronize(self) -> None:
        """Wait for all work submitted to the current device."""
        torch.accelerator.synchronize()

    def seed(self, seed: int) -> None:
        """Seed the CPU's generator and that of every device of this type."""
        torch.manual_seed(seed)
        torch.get_device_module(self.type).manual_seed_all(seed)

    def generator_state(self) -> dict[str, torch.Tensor]:
        """State of the CPU's and the current device's default generators, as uint8 tensors on the CPU."""
        return {
            "cpu": torch.get_rng_state(),
            self.type: torch.get_device_module(self.type).get_rng_state(),
        }

    def set_generator_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what ``generator_state`` returned on the same kind of device."""
        torch.set_rng_state(state["cpu"])
        torch.get_device_module(self.type).set_rng_state(state[self.type])

    def deterministic_environment(self) -> Mapping[str, str]:
        """Variables without which this stack's kernels or reductions may differ between two runs."""
        return {}

    def set_deterministic(self, on: bool) -> None:
        """Allow only kernels that give the same bits every time, or lift that.

        Call it before the first operation and before ``Collectives.init``: the variables are read then.
        """
        if on:
            set_unset(self.deterministic_environment())
        if on != torch.are_deterministic_algorithms_enabled():  # to tell torch takes seconds of imports
            torch.use_deterministic_algorithms(on)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Dense matrix FLOP/s of one device in ``dtype``; None if unknown.

        The variable PORTMOE_PEAK_TFLOPS, in 10¹² FLOP/s and for the dtype trained in, goes before the
        vendor's data sheet.

        Raises:
            ConfigError: the variable is not a positive number.
        """
        given = os.environ.get(PEAK_VARIABLE)
        if given is None:
            return self.data_sheet_flops(dtype)
        try:
            peak = float(given) * 1e12
        except ValueError:
            peak = math.nan
        if not 0 < peak < math.inf:
            raise ConfigError(
                f"{PEAK_VARIABLE}={given!r}: allowed is a positive number of 10¹² FLOP/s, as in 312; "
                "correct the environment variable or unset it"
            )
        return peak

    def data_sheet_flops(self, dtype: torch.dtype) -> float | None:
        """The vendor's figure for the current device, without sparsity; None where there is none."""
        return None


class Collectives:
    """The collectives part: which c10d backend, what it needs, what it can do."""

    backend: str  # c10d's name
    binds_device: bool = True  # the library can split a group bound to a device, as torch then asks it to
    capabilities: frozenset[str] = frozenset(
        {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "uneven_all_to_all"}
    )

    def environment(self, timeout: timedelta) -> Mapping[str, str]:
        """Variables the collective library reads; ``timeout``: how long a collective may wait for a rank."""
        return {}

    def init(
        self, device: torch.device, rank: int, world_size: int, timeout: timedelta, store: dist.Store
    ) -> None:
        """Create the default process group: this backend for the device, gloo for the CPU.

        ``device`` is the one ``Device.open`` returned. Where ``binds_device``, it is bound to the group, so
        that barriers never guess a device from the rank.
        """
        set_unset(self.environment(timeout))
        gloo.use_one_worker()
        on_host = is_host(device.type)
        backend = self.backend if on_host else f"cpu:gloo,{device.type}:{self.backend}"
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if self.binds_device and not on_host else None,
        )

    def host_group(self) -> dist.ProcessGroup:
        """A new group of all ranks for tensors on the CPU. Called by all ranks together."""
        world = dist.group.WORLD
        # Where a device is bound to the default group, torch asks every new group for that device's
        # backend, which one for the CPU alone does not have.
        bound, world.bound_device_id = world.bound_device_id, None
        try:
            return dist.new_group(backend="gloo")
        finally:
            world.bound_device_id = bound


class Operations(ABC):
    """The operations part: this vendor's implementations of the operations in ``portmoe.ops``."""

    @abstractmethod
    def implementations(self) -> Sequence["Implementation"]:
        """Every implementation this backend offers, the preferred one of each operation first.

        The plain-torch reference of each operation is always added after them.
        """


class BufferPool:
    """Buffers handed out and taken back, so that steady-state work allocates nothing.

    ``allocations`` counts the buffers ever created; it stops growing once every size in use
    has been seen.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.device, torch.dtype, int], list[torch.Tensor]] = {}
        self.allocations = 0

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A flat buffer of ``numel`` elements with undefined content."""
        free = self._free.get((device, dtype, numel))
        if free:
            return free.pop()
        self.allocations += 1
        return torch.empty(numel, dtype=dtype, device=device)

    def give(self, buffer: torch.Tensor) -> None:
        """Return a buffer got from ``take``; the caller must not use it any more."""
        self._free.setdefault((buffer.device, buffer.dtype, buffer.numel()), []).append(buffer)


class Memory:
    """The memory part: statistics in bytes, allocator settings, pooled buffers."""

    def __init__(self) -> None:
        self.pool = BufferPool()

    def environment(self) -> Mapping[str, str]:
        """Variables the allocator reads at its first allocation."""
        return {}

    def allocated(self) -> int:
        """Bytes held by tensors on the current device."""
        return torch.accelerator.memory_allocated()

    def peak(self) -> int:
        """Largest ``allocated()`` since the last ``reset_peak()``."""
        return torch.accelerator.max_memory_allocated()

    def reset_peak(self) -> None:
        torch.accelerator.reset_peak_memory_stats()

    def keep_freed(self) -> None:
        """Use freed memory again from now on, not hand it back to the system. Most allocators do so."""

    def total(self) -> int:
        """Bytes of memory the current device has."""
        return torch.accelerator.get_memory_info()[1]


@dataclass(frozen=True)
class Accelerator:
    """One backend: its name and its four parts.

    ``priority`` orders the backends that ``auto`` tries; the highest usable one is taken.
    """

    name: str
    device: Device
    collectives: Collectives
    ops: Operations
    memory: Memory
    priority: int = 10

    def open(self, local_rank: int) -> torch.device:
        """Set the environment device and memory want, then open device ``local_rank``."""
        set_unset(self.device.environment())
        set_unset(self.memory.environment())
        return self.device.open(local_rank)
