"""The all-to-all with a gradient, as sequence and expert parallelism use it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def all_to_all(
    x: torch.Tensor,
    group: dist.ProcessGroup,
    sent: Sequence[int] | None = None,
    received: Sequence[int] | None = None,
) -> torch.Tensor:
    """Send each rank of ``group`` its rows of ``x``, in their order; the gradient goes back the same way.

    Args:
        x: [rows, …], the same trailing shape on every rank.
        sent: rows for each rank; None: an equal share.
        received: rows from each rank; None: an equal share.

    Returns:
        [rows received, …], in the order of the ranks. A plain tensor that is there when it is returned: an
        operation may read its memory by address, and what functional collectives return has none yet.
    """
    return _AllToAll.apply(x, group, sent, received)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        group: dist.ProcessGroup,
        sent: Sequence[int] | None,
        received: Sequence[int] | None,
    ) -> torch.Tensor:
        ctx.back = (group, received, sent)
        y = x.new_empty((x.shape[0] if received is None else sum(received), *x.shape[1:]))
        dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _AllToAll.apply(grad, *ctx.back), None, None, None
