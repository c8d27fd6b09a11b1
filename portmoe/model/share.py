"""One rank's share of a micro-batch and of each layer's weights, in numbers.

From it modules tell which operations they call with which shapes, what they cost and what they keep.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from portmoe.ops import Workload

FP32_BYTES = 4
INDEX_BYTES = 8


class Call(NamedTuple):
    """An operation as a module calls it."""

    operation: str
    site: str
    workload: Workload


class PartCost(NamedTuple):
    """What a part of a step cannot do without, for one micro-batch.

    Attributes:
        part: as profiles name it.
        forward_flops: of the products of one forward pass: a product with an [m,n] matrix is 2·m·n a row.
        moved_bytes: of every argument, result and gradient of both passes, read or written once.
    """

    part: str
    forward_flops: float
    moved_bytes: float = 0


@dataclass(frozen=True)
class Share:
    """What one rank works on.

    Attributes:
        tokens: T, of a micro-batch, over all ranks that share it.
        attended: how many tokens a query meets on average, or is counted with.
        ranks: that share a layer, or, where ``token_split`` is set, the heads of the same tokens.
        token_split: each of these ranks has whole weights and its own tokens.
        ring: ranks, or groups of ``ranks``, that keys and values go around; each attends with its own tokens.
        between: tokens this rank has between the regions of layers.
        regather: what enters a region is gathered again for the backward pass, not kept.
        expert_ranks: ranks the experts are spread over.
        expert_shard: experts computed at a time; None: all that are here.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int
    seq_len: int
    attended: float
    equal_segments: bool = False
    ranks: int = 1
    token_split: bool = False
    ring: int = 1
    between: int | None = None
    regather: bool = False
    expert_ranks: int = 1
    expert_shard: int | None = None

    @property
    def parts(self) -> int:
        """Ranks the weights of a layer are cut over."""
        return 1 if self.token_split else self.ranks

    @property
    def own(self) -> int:
        """Tokens between the regions."""
        return self.tokens if self.between is None else self.between

    @property
    def inside(self) -> int:
        """Tokens of the products with weights."""
        return self.own if self.token_split else self.tokens

    @property
    def attending(self) -> int:
        """Tokens of the queries, keys and values this rank has."""
        return self.tokens // self.ring

    @property
    def entering(self) -> int:
        """Tokens kept of what enters a region."""
        return self.own if self.regather or self.token_split else self.tokens

    @property
    def item(self) -> int:
        """Bytes of an activation."""
        return self.dtype.itemsize

    def workload(self, tokens: int, **sizes: int | bool | None) -> Workload:
        """The workload of a call with these sizes; those an operation does not know are 0."""
        unknown = dict.fromkeys(
            ("hidden", "heads", "head_dim", "ffn_width", "vocab", "experts", "top_k", "capacity"), 0
        )
        return Workload(
            device=self.device,
            dtype=self.dtype,
            tokens=tokens,
            seq_len=self.seq_len,
            equal_segments=self.equal_segments,
            **unknown | sizes,
        )

    def of_attention(self, **sizes: int | None) -> Workload:
        """The workload of ``attention``; around a ring it is asked for pieces, to be put together."""
        work = self.workload(self.attending, **sizes)
        if self.ring == 1:
            return work
        even = self.equal_segments and self.seq_len % self.ring == 0
        length = -(-self.seq_len // self.ring)
        return replace(work, seq_len=length, equal_segments=even, log_sum=True)


def one_token(attended: float) -> Share:
    """The share of a rank that computes one token with whole weights: what it costs is the cost a token."""
    return Share(torch.device("meta"), torch.float32, tokens=1, seq_len=1, attended=attended)


def site(*roles: str) -> str:
    """The name of a call site: where it is, what it is for."""
    return ", ".join(filter(None, roles))


Calls = Iterator[Call]
Costs = Iterator[PartCost]
