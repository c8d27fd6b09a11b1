"""How parameters sharded by ``parallel.weight`` are gathered: ahead of their use, and into pooled buffers.

The sharding itself is ``zero``'s: a block's parameters are gathered for its forward and again for its
backward pass. With ``weight.overlap`` the gather of the next block starts before a block computes, in both
passes, and runs meanwhile; without, a block is gathered when its turn has come. With ``weight.memory_pool``
what a gather writes to comes from the accelerator's pool and goes back once the parameters are copied out.
"""

import math
import weakref
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from portmoe.accelerator.interface import BufferPool
from portmoe.config.sections.execution import WeightConfig
from portmoe.model.decoder import Decoder


def gather_by(model: Decoder, weight: WeightConfig, pool: BufferPool) -> None:
    """Let the sharded ``model`` gather as ``weight`` says; what is pooled is taken from ``pool``."""
    gather = _Gather(weight.overlap, pool if weight.memory_pool else None)
    for module in _sharded(model):
        module.set_custom_all_gather(gather)
        # Naming itself, which is whole already, a module is kept from the engine's own choice.
        module.set_modules_to_backward_prefetch([module])
    if weight.overlap:
        blocks = [_sharded(block) for block in model.layers.values()]
        order = [[model], *blocks]
        for before, after in zip(order, [*order[1:], []], strict=True):
            before[0].set_modules_to_forward_prefetch(after)
        order = [[model], *reversed(blocks)]
        for before, after in pairwise(order):
            before[0].set_modules_to_backward_prefetch(after)


def _sharded(module: nn.Module) -> list[FSDPModule]:
    """``module`` and what is in it, as far as it is a parameter group of its own."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


class _Gather(DefaultAllGather):
    """The all-gather of a parameter group.

    Args:
        background: return at once; the engine waits for the result where it needs it.
        pool: None: every call gets a fresh buffer.
    """

    def __init__(self, background: bool, pool: BufferPool | None) -> None:
        self._background = background
        self._pool = pool

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self._pool is None:
            return super().allocate(size, dtype=dtype, device=device)
        buffer = self._pool.take(math.prod(size), dtype, device)
        # The engine drops the result when the parameters are copied out of it, and tells no one: so it gets
        # a view, whose end means that.
        lent = buffer.view(*size)
        weakref.finalize(lent, self._pool.give, buffer)
        return lent

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        return super().__call__(output_tensor, input_tensor, group, async_op or self._background)
