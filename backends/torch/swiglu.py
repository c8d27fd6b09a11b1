"""SwiGLU by torch's own silu."""

import torch
import torch.nn.functional as F

from portmoe.ops.operation import Implementation


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """The contract of ``swiglu``."""
    return F.silu(gate_TF) * up_TF


SWIGLU = Implementation("swiglu", "silu", swiglu)
