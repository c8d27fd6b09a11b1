"""One micro-batch as the model takes it."""

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from portmoe.data.pack import Pack
from portmoe.data.sources.sample import DATA_TYPES
from portmoe.ops.attention import Segments
from portmoe.ops.cross_entropy import IGNORED


@dataclass(frozen=True, eq=False)
class Batch:
    """One pack as int64 tensors of shape [T]; attention and positions never cross a segment."""

    tokens_T: torch.Tensor
    labels_T: torch.Tensor  # IGNORED: no label here
    positions_T: torch.Tensor  # from 0 in each segment
    types_T: torch.Tensor  # indices into ``types``
    segments: Segments
    index: int  # number of the micro-batch, counted over all ranks since the run's start
    crc32: int = 0  # of tokens, labels and the segments' ends
    # int64, places of tokens: the decoder gives logits of what follows them, and no loss; None: the loss
    asked_B: torch.Tensor | None = None
    types: tuple[str, ...] = DATA_TYPES  # names of what tokens are told apart by, the same in all batches

    @classmethod
    def from_pack(cls, pack: Pack, index: int, types: tuple[str, ...] = DATA_TYPES) -> "Batch":
        """Return the micro-batch that ``pack`` is, on the CPU."""
        labels_T = np.where(pack.labelled_T, pack.labels_T, IGNORED)
        arrays = (pack.tokens_T, labels_T, pack.positions_T, pack.types_T)
        crc32 = 0
        for array in (pack.tokens_T, labels_T, np.asarray(pack.offsets, dtype=np.int64)):
            crc32 = zlib.crc32(np.ascontiguousarray(array), crc32)
        return cls(
            *map(torch.from_numpy, arrays),
            segments=Segments(offsets=pack.offsets, padded=pack.padded),
            index=index,
            crc32=crc32,
            types=types,
        )

    def unlabelled(self) -> "Batch":
        """Return the batch without a label, all padding: it counts in no loss and no metric."""
        segments = Segments(self.segments.offsets, padded=len(self.segments.lengths))
        return replace(self, labels_T=torch.full_like(self.labels_T, IGNORED), segments=segments)

    @property
    def num_segments(self) -> int:
        """What the benchmark's log line counts as samples."""
        return len(self.segments.real_lengths)

    @property
    def longest_segment(self) -> int:
        """Tokens in the longest segment; 0 where all is padding."""
        return max(self.segments.real_lengths, default=0)

    @property
    def padding(self) -> int:
        """Tokens that are of no sample."""
        return self.segments.total - self.segments.real

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with its tensors on ``device``."""
        names = ("tokens_T", "labels_T", "positions_T", "types_T", "asked_B")
        there = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in there.items()}
        return replace(self, **moved)
