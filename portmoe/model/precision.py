"""The dtype activations and matrix products have; parameters are always float32 masters.

A module computes in the dtype of the activations it receives. The sharding engine hands it compute
copies in that dtype already; on a plain module ``linear.Linear`` and its kin cast the master weights
at use, which gives the same numbers.
"""

import torch
from torch.distributed.tensor import DTensor

from portmoe.config.section import ModelSection

_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,  # a mode of the device's float32 products, not a storage type
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def compute_dtype(model: ModelSection) -> torch.dtype:
    """The dtype of activations and of the weights used in products."""
    return _DTYPES[model.dtype]


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a sharded tensor, a view; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def computed(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a module computes with: the part of ``parameter`` that lies on this rank, in ``dtype``."""
    return local_tensor(parameter).to(dtype)
