"""Twins: the same run from weights that lie one unit in their last place away.

Two of them part as fast as rounding grows in this run, which is how far two right runs of it can be compared.
"""

from collections.abc import Mapping

import numpy as np
import torch

from portmoe.config import Config
from portmoe.model.init import local_part
from portmoe.model.precision import compute_dtype
from portmoe.training.engine import Engine

_ODD = np.uint32(0x9E3779B1)  # the golden ratio, as multiplicative hashing takes it


def begin_apart(engine: Engine, config: Config) -> None:
    """Move the weights a run begins with, as ``run.twin`` asks. Collective."""
    tensors = engine.tensors()
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    move(weights, compute_dtype(config.model), config.run.twin)
    engine.take(tensors)


@torch.no_grad()
def move(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, twin: int) -> None:
    """Move every weight by one unit in its last place in ``dtype``, up or down, in place; zeros stay.

    The direction depends on the weight's own bits, its column and ``twin``: it is the same in every layout.

    Args:
        tensors: weights in float32, plain tensors or this rank's parts of DTensors.
        dtype: what the model computes in.
    """
    for tensor in tensors.values():
        local, offset = local_part(tensor)
        values = local.float().cpu().numpy()
        columns = np.arange(offset[-1], offset[-1] + values.shape[-1], dtype=np.uint32)
        moved = values + _sign(values, columns, twin) * _unit(values, torch.finfo(dtype).eps)
        local.copy_(torch.from_numpy(moved))


def _unit(values: np.ndarray, eps: float) -> np.ndarray:
    """The distance from each number to the next larger one of the dtype with this ``eps``; 0 for 0."""
    fraction, exponent = np.frexp(values)
    return np.where(fraction == 0, 0, np.ldexp(np.float32(eps), exponent - 1)).astype(np.float32)


def _sign(values: np.ndarray, columns: np.ndarray, twin: int) -> np.ndarray:
    """1 or −1, by bits that a multiplicative hash has mixed."""
    bits = np.ascontiguousarray(values).view(np.uint32) ^ np.uint32(twin * 0x85EBCA6B % 2**32)
    for _ in range(2):
        bits = (bits ^ (bits >> np.uint32(15)) ^ columns) * _ODD
    return np.where(bits >> np.uint32(31), np.float32(1), np.float32(-1))
