"""portmoe: one Mixture-of-Experts trainer on every accelerator, with the same numbers.

The names below are the stable Python interface. They load on first use, because
importing torch takes seconds and ``portmoe --help`` must not. docs/library.md shows them in use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portmoe import data, model, ops
    from portmoe.accelerator import get_accelerator
    from portmoe.config import Config
    from portmoe.config.read import load_config
    from portmoe.errors import PortmoeError
    from portmoe.record.results import read_metrics
    from portmoe.training.run import Outcome, train

__version__ = "0.1.0"

_HOME = {
    "Config": "portmoe.config",
    "load_config": "portmoe.config.read",
    "train": "portmoe.training.run",
    "Outcome": "portmoe.training.run",
    "read_metrics": "portmoe.record.results",
    "get_accelerator": "portmoe.accelerator",
    "PortmoeError": "portmoe.errors",
    "ops": "portmoe.ops",
    "model": "portmoe.model",
    "data": "portmoe.data",
}

__all__ = [
    "Config",
    "Outcome",
    "PortmoeError",
    "__version__",
    "data",
    "get_accelerator",
    "load_config",
    "model",
    "ops",
    "read_metrics",
    "train",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'portmoe' has no attribute {name!r}")
    home = import_module(_HOME[name])
    return home if home.__name__ == f"portmoe.{name}" else getattr(home, name)
