"""Keeping one rank's part of a gathered tensor for the backward pass, and gathering it again there.

What an operation keeps for its backward pass goes through torch's hooks for saved tensors. Where that is
the gathered tensor itself, a stand-in is kept in its place; the first operation that asks for it in the
backward pass gathers, the others share the result, and it is dropped when the last has used it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def regathered(
    whole: torch.Tensor, part: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Operations in the ``with`` block keep ``part`` where they would keep ``whole``.

    Args:
        whole: requires gradients.
        gather: makes ``whole`` of ``part``; called in the backward pass, in the same order on all ranks.
    """
    later, place = (
        _Regathered(part.detach(), gather),
        _place(whole),
    )  # autograd keeps the hooks, and not ``whole``

    def pack(saved: torch.Tensor) -> "torch.Tensor | _Regathered":
        return later if _place(saved) == place else saved

    def unpack(kept: "torch.Tensor | _Regathered") -> torch.Tensor:
        return kept.whole() if isinstance(kept, _Regathered) else kept

    with saved_tensors_hooks(pack, unpack):
        yield
    whole.register_hook(later.drop)  # its gradient is complete once the last operation has used it


class _Regathered:
    """A gathered tensor that is there from its first use in a backward pass to its last."""

    def __init__(self, part: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._part = part
        self._gather = gather
        self._whole: torch.Tensor | None = None

    def whole(self) -> torch.Tensor:
        if self._whole is None:
            with torch.no_grad():
                self._whole = self._gather(self._part)
        return self._whole

    def drop(self, _: torch.Tensor) -> None:
        self._whole = None


def _place(tensor: torch.Tensor) -> tuple:
    """The same for tensors that are the same numbers in memory, also for tensors that have none."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()
