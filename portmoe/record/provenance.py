"""What ``environment.json`` keeps: enough to tell, later, what a run ran on."""

import importlib.metadata
import os
import platform
from datetime import timedelta
from typing import Any

from portmoe.accelerator import Accelerator
from portmoe.accelerator.discovery import find
from portmoe.accelerator.preflight import preflight_of
from portmoe.record.origin import of_report

# Only these are kept, besides those the accelerator's parts name: others may hold secrets.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_ALLOC_CONF", "TORCH_DEVICE_BACKEND_AUTOLOAD")
PACKAGES = ("torch", "numpy", "pydantic", "tensorboard")


def describe(accelerator: Accelerator, world_size: int) -> dict[str, Any]:
    """Versions, machine, device, ranks and the environment variables that steer them; JSON-ready."""
    made = of_report()
    return {
        **{key: made[key] for key in ("date", "host", "command", "portmoe", "commit", "python")},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": made["system"],
        "processor": platform.processor() or platform.machine(),
        "backend": accelerator.name,
        "device": accelerator.device.name(),
        "devices": accelerator.device.count(),
        "facts": accelerator.device.probe().facts,
        "collectives": accelerator.collectives.backend,
        "ranks": world_size,
        "variables": variables(accelerator),
    }


def variables(accelerator: Accelerator) -> dict[str, str]:
    """The environment variables that steer the run, as they are set."""
    parts = (
        preflight_of(find(accelerator.name)).environment,
        accelerator.device.environment(),
        accelerator.device.deterministic_environment(),
        accelerator.collectives.environment(timedelta(minutes=1)),  # for its names
        accelerator.memory.environment(),
    )
    names = sorted({*VARIABLES, *(name for part in parts for name in part)})
    return {name: os.environ[name] for name in names if name in os.environ}
