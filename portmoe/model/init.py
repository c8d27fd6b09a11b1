"""Initial weights that depend on the seed and the parameter's name, and on nothing else.

Every parameter that is not constant is cut into fixed blocks of whole rows. A block's values are the
first standard normal numbers of numpy's Philox generator, keyed by (seed, name) and started at a counter
that is the block's number. A rank draws only the blocks it holds rows of, so the weights are the same in
every layout and on every backend. (numpy keeps Philox's bits fixed for good, and the normal numbers made
from them fixed within a release.)
"""

import hashlib
import math
import re

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from portmoe.config import Config
from portmoe.families.architecture import Initial

BLOCK_NUMBERS = 1 << 16  # a block has as many whole rows as fit this many numbers, at least one

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@torch.no_grad()
def initialise(module: nn.Module, config: Config, prefix: str = "") -> None:
    """Set every parameter of ``module`` in place; parameters on the meta device are passed over.

    Parameters may be plain tensors (the whole parameter) or DTensors in any placement, of any dtype and
    device; values are drawn in float32 and rounded to the parameter's dtype.

    Args:
        prefix: what comes before a parameter's name in the whole model, as "layers.3.moe.".
    """
    for local_name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        name = prefix + local_name
        local, offset = local_part(parameter)
        constant = _constant(name)
        if constant is not None:
            local.fill_(constant)
        else:
            std = standard_deviation(name, config.architecture.initial)
            _draw(local, offset, parameter.shape, config.run.seed, name, std)


def standard_deviation(name: str, initial: Initial) -> float:
    """Return that of a normally initialised parameter, by its name in the whole model."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return initial.vocabulary
    layer, inner = int(match[1]), match[2]
    if ".router." in inner:
        return initial.router
    to_residual = inner == "attention.out.weight" or inner.removesuffix(".weight").endswith(".w2")
    if initial.by_depth and to_residual:
        return initial.projection / math.sqrt(2 * (layer + 1))
    return initial.projection


def _constant(name: str) -> float | None:
    """1 for norm gains, 0 for biases, None for what is drawn."""
    *_, owner, leaf = name.split(".")
    if owner.endswith("norm"):
        return 1.0
    return 0.0 if leaf == "bias" else None


def local_part(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This rank's part of ``parameter`` and where it begins in the whole one."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.ndim
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), offset


def _draw(
    local: torch.Tensor, offset: tuple[int, ...], shape: torch.Size, seed: int, name: str, std: float
) -> None:
    """Draw this rank's part; a stack of matrices has its rows numbered through."""
    rows, columns = shape[-2:]
    key = np.frombuffer(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=16).digest(), dtype="<u8")
    matrices = local if local.ndim == 3 else local[None]
    number = offset[0] if local.ndim == 3 else 0
    for local_RC in matrices:
        first = number * rows + offset[-2]
        _draw_rows(local_RC, first, offset[-1], shape.numel() // columns, columns, key, std)
        number += 1


def _draw_rows(
    local_RC: torch.Tensor, first: int, left: int, rows: int, columns: int, key: np.ndarray, std: float
) -> None:
    """Draw what begins at row ``first`` and column ``left`` of ``rows`` by ``columns`` numbers."""
    block_rows = max(1, BLOCK_NUMBERS // columns)
    last, right = first + local_RC.shape[0], left + local_RC.shape[1]
    for start in range(first - first % block_rows, last if local_RC.numel() else first, block_rows):
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, start // block_rows]))
        block = generator.standard_normal((min(block_rows, rows - start), columns), dtype=np.float32)
        block *= np.float32(std)
        low, high = max(start, first), min(start + len(block), last)
        local_RC[low - first : high - first].copy_(
            torch.from_numpy(block[low - start : high - start, left:right])
        )
