"""Tests on the simulated NPU. Torch has one accelerator a process, so they run in processes of their own.

``on_device/`` is collected only where the plug-in is loaded; ``test_on_device.py`` starts such a process.
"""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ACTIVE = "torch_npu" in sys.modules
collect_ignore = [] if ACTIVE else ["on_device"]


@pytest.fixture(scope="session")
def simulated(request):
    """The environment of a process that has simulated NPUs; the device is compiled once per cache."""
    cache = request.config.cache.mkdir("simulated-npu")
    paths = [str(HERE / "plugin"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SIMULATED_NPU_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
    }
