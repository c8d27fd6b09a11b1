"""Expert parallelism: the experts of a layer spread over data-parallel ranks, rows exchanged by all-to-all.

Each rank routes its own micro-batch. The rows for the experts of another rank are sent to it, computed
there and sent back, so that routing, capacity and drops are those of a layer that has all its experts here.
Every rank takes part in every exchange, also with no row to send or to compute: an expert without a token
neither keeps the others waiting nor loses its gradient, which is zero.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from portmoe.model.decoder import Decoder
from portmoe.model.sharing import compute_here
from portmoe.parallel.all_to_all import all_to_all
from portmoe.parallel.mesh import Meshes


def spread(model: Decoder, meshes: Meshes) -> None:
    """Let every layer's experts, which are cut over ranks, exchange rows with them."""
    if meshes.expert.size() == 1:
        return
    for module in model.modules():
        if getattr(module, "exchange", None) is compute_here:
            module.exchange = _Exchange(meshes.expert.get_group(), even=module.even)


class _Exchange:
    """Sends rows to the ranks that hold their experts, and the results back.

    Args:
        even: all ranks' static buffers are of one capacity. Else the largest is used, as in a layer whose
            capacity follows the routing.
    """

    def __init__(self, group: dist.ProcessGroup, even: bool) -> None:
        self._group = group
        self._ranks = group.size()
        self._even = even

    def __call__(
        self, compute: Callable[..., torch.Tensor], x: torch.Tensor, ends_E: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute all experts, as ``Experts.forward`` does; ``compute`` is that of the experts held here."""
        if ends_E is None:
            return self._static(compute, x)
        return self._ragged(compute, x, ends_E)

    def _static(self, compute: Callable[..., torch.Tensor], x_ECH: torch.Tensor) -> torch.Tensor:
        own = x_ECH.shape[1]
        if not self._even:
            largest = torch.tensor(own, device=x_ECH.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
            x_ECH = F.pad(x_ECH, (0, 0, 0, int(largest) - own))
        capacity = x_ECH.shape[1]
        # From every rank (outer) its rows for each expert held here, to every expert (outer) its rows.
        x_PECH = self._send(x_ECH).unflatten(0, (self._ranks, -1))
        y_ERH = compute(x_PECH.transpose(0, 1).flatten(1, 2))
        y_PECH = y_ERH.unflatten(1, (self._ranks, capacity)).transpose(0, 1)
        y_ECH = self._send(y_PECH.flatten(0, 1))
        return y_ECH if own == capacity else y_ECH[:, :own].contiguous()

    def _ragged(
        self, compute: Callable[..., torch.Tensor], x_RH: torch.Tensor, ends_E: torch.Tensor
    ) -> torch.Tensor:
        sent_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
        received_PE = all_to_all(sent_E, self._group).view(self._ranks, -1)
        sent = sent_E.view(self._ranks, -1).sum(1).tolist()
        received = received_PE.sum(1).tolist()
        rows_RH = all_to_all(x_RH, self._group, sent, received)
        # They come rank by rank, each sorted by expert; the experts want them expert by expert.
        expert_PE = torch.arange(received_PE.shape[1], device=x_RH.device).expand_as(received_PE)
        order_R = expert_PE.flatten().repeat_interleave(received_PE.flatten()).argsort(stable=True)
        y_RH = compute(rows_RH.index_select(0, order_R), received_PE.sum(0).cumsum(0))
        y_RH = y_RH.index_select(0, order_R.argsort())
        return all_to_all(y_RH, self._group, received, sent)

    def _send(self, x_ECH: torch.Tensor) -> torch.Tensor:
        """An equal share of the first dimension to every rank."""
        return all_to_all(x_ECH, self._group)
