"""A block that keeps its input and computes the rest again in the backward pass."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def recomputed(compute: Callable[[torch.Tensor], Any], x: torch.Tensor, offload: bool) -> Any:
    """``compute(x)``, of which ``x`` alone is kept. No generator's state is saved: there must be no draws.

    Args:
        offload: ``x`` waits in host memory, as the same bits; where it is there already, it stays as it is.
    """
    # The hooks see what is saved around the block; what is saved inside goes to those of the recomputation.
    moved = saved_tensors_hooks(_to_host, _back) if offload and not on_host(x) else nullcontext()
    with moved:
        return checkpoint(compute, x, use_reentrant=False, preserve_rng_state=False)


def on_host(x: torch.Tensor) -> bool:
    """Whether ``x`` lies in host memory."""
    return x.device == torch.device("cpu")


def _to_host(x: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    # From and to pinned memory copies wait in the device's queue, and the host goes on.
    kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=_can_pin())
    return x.device, kept.copy_(x, non_blocking=_can_pin())


def _back(kept: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, x = kept
    return x.to(device, non_blocking=_can_pin())


@cache
def _can_pin() -> bool:
    """Whether host memory can be pinned for the device here; without, the same copies take longer."""
    try:
        return torch.empty(1, pin_memory=True).is_pinned()
    except (RuntimeError, NotImplementedError):
        return False
