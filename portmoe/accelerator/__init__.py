"""One accelerator: a device, its collectives, its operations and its memory.

The names load on first use: ``discovery``, ``preflight`` and ``probing`` work without torch, so that a
broken torch can be explained; ``interface`` needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portmoe.accelerator.discovery import get_accelerator, registered_names
    from portmoe.accelerator.interface import Accelerator, Collectives, Device, Memory, Operations
    from portmoe.accelerator.preflight import Preflight
    from portmoe.accelerator.probing import Probe, Problem

_HOME = {
    "Accelerator": "interface",
    "Collectives": "interface",
    "Device": "interface",
    "Memory": "interface",
    "Operations": "interface",
    "Preflight": "preflight",
    "Probe": "probing",
    "Problem": "probing",
    "get_accelerator": "discovery",
    "registered_names": "discovery",
}

__all__ = [
    "Accelerator",
    "Collectives",
    "Device",
    "Memory",
    "Operations",
    "Preflight",
    "Probe",
    "Problem",
    "get_accelerator",
    "registered_names",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'portmoe.accelerator' has no attribute {name!r}")
    return getattr(import_module(f"portmoe.accelerator.{_HOME[name]}"), name)
