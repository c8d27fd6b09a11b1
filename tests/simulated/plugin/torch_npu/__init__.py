"""A stand-in for torch_npu: the documented functions on a SIMULATED device. Not the vendor's plug-in.

torch loads it by itself, as it loads the real one, where this folder's parent is on PYTHONPATH. The functions
have the registered schemas and refuse what the documentation refuses; ``faults`` makes them fail on purpose.
"""

import json
import os
from datetime import timedelta
from pathlib import Path

_autoload_asked = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # imported before torch, this must not be imported again

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from torch_npu import build, faults  # noqa: E402

if _autoload_asked is None:
    del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
else:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload_asked

__version__ = "2.13.0+simulated"

torch.ops.load_library(str(build.library()))
torch.ops.simulated_npu.start()
_kernels = Path(__file__).parents[3] / "vendors" / "kernels.json"
torch.ops.simulated_npu.kernels(json.loads(_kernels.read_text())["kernels"])
torch.utils.rename_privateuse1_backend("npu")

from torch_npu import npu  # noqa: E402  needs what was loaded

torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend()

from torch_npu import operations  # noqa: E402

_repr = torch.Tensor.__repr__


def _printed(self: torch.Tensor, *, tensor_contents: object = None) -> str:
    """Printing computes in float64, which the device refuses: print a copy on the host."""
    if type(self) is torch.Tensor and self.device.type == "npu":
        return f"{_repr(self.detach().cpu())[:-1]}, device='{self.device}')"
    return _repr(self, tensor_contents=tensor_contents)


torch.Tensor.__repr__ = _printed

faults.from_environment()


def _hccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Backend:
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


dist.Backend.register_backend("hccl", _hccl, devices=["npu"])


def _autoload() -> None:
    """What torch calls after it has imported this module."""


def __getattr__(name: str):
    if name in operations.DOCUMENTED and name not in faults.lacking():
        return operations.DOCUMENTED[name]
    raise AttributeError(f"module 'torch_npu' has no attribute {name!r} (simulated)")
