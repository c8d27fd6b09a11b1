"""portmoe: one Mixture-of-Experts trainer on every accelerator, with the same numbers.

The names below are the stable Python interface. They load on first use, because
importing torch takes seconds and ``portmoe --help`` must not.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Config": "portmoe.config",
    "load_config": "portmoe.config.read",
    "get_accelerator": "portmoe.accelerator",
    "PortmoeError": "portmoe.errors",
    "ops": "portmoe.ops",
    "model": "portmoe.model",
    "data": "portmoe.data",
}

__all__ = ["Config", "PortmoeError", "__version__", "data", "get_accelerator", "load_config", "model", "ops"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'portmoe' has no attribute {name!r}")
    home = import_module(_HOME[name])
    return home if home.__name__ == f"portmoe.{name}" else getattr(home, name)
