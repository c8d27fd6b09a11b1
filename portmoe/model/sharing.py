"""What modules declare of how ranks may share them, and what they do alone.

A module names the ``cuts`` of its parameters, and where activations cross between ranks it calls its
``region``, ``tokens``, ``exchange`` or ``shards``, which do nothing until ``parallel`` puts others in their
place. So a module says itself where it can be cut and where its region ends, and parallelism knows no module
by name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from portmoe.ops import Segments


@dataclass(frozen=True)
class Cut:
    """How a parameter may lie on ranks that share its module.

    Attributes:
        tensor: the dimension that tensor-parallel ranks cut; None: each of them has the whole.
        expert: the dimension that ranks which spread the experts cut; None: each of them has the whole.
        pieces: at most so many ranks can cut the tensor dimension. Where there are more, a multiple, each has
            the whole and uses its part.
        inside: whether it is used inside a region, where what a rank computes is a part of a sum: the
            gradient of a parameter that is not cut then is such a part too.
    """

    tensor: int | None = None
    expert: int | None = None
    pieces: int | None = None
    inside: bool = True

    def over(self, ranks: int) -> "Cut":
        """The cut over so many tensor-parallel ranks."""
        return self if self.pieces is None or ranks <= self.pieces else replace(self, tensor=None)


INSIDE = Cut()
BETWEEN = Cut(inside=False)  # of what is computed on the tokens between the regions


def declared_cuts(model: nn.Module, ranks: int = 1) -> dict[str, Cut]:
    """The cut of every parameter of ``model`` by name, as far as a module around it declares one.

    ``cuts`` of a module maps names below the module to cuts. The outermost declaration holds: it knows what
    the parts are used for.

    Args:
        ranks: that share a layer.
    """
    found: dict[str, Cut] = {}
    for path, module in model.named_modules():
        for name, cut in getattr(module, "cuts", {}).items():
            found.setdefault(f"{path}.{name}".lstrip("."), cut.over(ranks))
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


class Alone:
    """The region of a module that one rank computes: entering and leaving change nothing."""

    parts = 1  # ranks that share the module
    rank = 0  # this one among them

    @contextmanager
    def entered(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """All tokens [T, …] of the micro-batch, for what is computed in the ``with`` block."""
        yield x

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' ``y``, of the tokens this rank has between the regions."""
        return y

    def counted_once(self, loss: torch.Tensor) -> None:
        """Every rank computes ``loss`` whole inside the region: let its gradient count as one rank's."""


class AllTokens:
    """The tokens of a micro-batch, all on this rank."""

    def own(self, whole: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's part of what is known of all tokens."""
        return whole

    def whole_shape(self, own: torch.Tensor) -> tuple[int, ...]:
        """The shape of ``own`` for all tokens."""
        return tuple(own.shape)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """All tokens' values from each rank's; the gradients of all ranks are summed on the way back."""
        return own

    def attended(self, whole: torch.Tensor) -> torch.Tensor:
        """The part that this rank has in attention of what is known of all tokens."""
        return whole

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange own tokens of all heads for attended tokens of own heads; heads lie in dimension 1."""
        return x

    def to_every_head(self, x: torch.Tensor) -> torch.Tensor:
        """Attended tokens' values of what all heads share, from own tokens'."""
        return x

    def to_tokens(self, y: torch.Tensor) -> torch.Tensor:
        """Back from attended tokens of own heads to own tokens of all heads."""
        return y

    def attend(
        self,
        attention: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> torch.Tensor:
        """The operation ``attention`` of this rank's queries over all tokens' keys and values."""
        return attention(q, k, v, segments, scale)

    ranks = 1  # that have other tokens, this one included
    head_ranks = 1  # those among them that have other heads of the same tokens in attention

    @property
    def split(self) -> bool:
        """Whether other ranks have other tokens."""
        return self.ranks > 1


ALONE = Alone()
ALL_TOKENS = AllTokens()


def compute_here(
    compute: Callable[..., torch.Tensor], x: torch.Tensor, ends_E: torch.Tensor | None
) -> torch.Tensor:
    """The exchange of experts that all lie on this rank: none."""
    return compute(x, ends_E)
