"""The benchmark's packing: samples laid end to end and cut into packs of equal size, one per micro-batch."""

from collections.abc import Sequence

import numpy as np

from portmoe.data.pack import Pack
from portmoe.data.sampler import PackSampler
from portmoe.data.sources.sample import Samples

ORDER_SEED = 1024  # fixed by the benchmark, whatever run.seed is


class Packing:
    """Packs of ``pack_len`` tokens, a multiple of ``seq_len``, made from one data set.

    The samples, shuffled by ``RandomState(1024)``, are laid end to end; pack p is the tokens
    p·pack_len … (p+1)·pack_len, and the rest that fills no pack is left out. A segment is the part
    of one sample inside one pack, or, where that part is longer than ``seq_len``, each piece of
    ``seq_len`` tokens of it. Positions restart at 0 in every segment. A token's label is the next
    token of its sample, also where a piece or the pack ends between the two; the last token of a
    sample has none, and neither has one before a token that the sample says is not learned. Source: the
    benchmark.
    """

    def __init__(self, samples: Samples, seq_len: int, pack_len: int) -> None:
        self._samples = samples
        self._seq_len = seq_len
        self._pack_len = pack_len
        self._order = np.arange(len(samples.lengths))
        np.random.RandomState(ORDER_SEED).shuffle(self._order)
        self.ends = np.cumsum(samples.lengths[self._order])  # where each sample ends among all tokens
        self.num_tokens = int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return self.num_tokens // self._pack_len

    @property
    def left_out(self) -> int:
        """Tokens that fill no pack."""
        return self.num_tokens % self._pack_len

    @property
    def divided(self) -> int:
        """Samples that do not lie in one pack."""
        first, last = np.insert(self.ends[:-1], 0, 0), self.ends - 1
        return int((first // self._pack_len != last // self._pack_len).sum())

    @property
    def equal_segments(self) -> bool:
        """True where every segment of every pack has exactly ``seq_len`` tokens."""
        return not (self._samples.lengths % self._seq_len).any()

    def pack(self, index: int) -> Pack:
        """Build one pack; touches only the samples that lie in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        start, stop = index * self._pack_len, (index + 1) * self._pack_len
        tokens, labels, labelled, offsets = [], [], [], [0]
        place = int(np.searchsorted(self.ends, start, side="right"))
        while offsets[-1] < self._pack_len:
            sample = self._samples.sample(self._order[place])
            length = len(sample.tokens_T)
            first = int(self.ends[place]) - length  # where the sample begins among all tokens
            begin, end = max(start - first, 0), min(stop - first, length)
            tokens.append(sample.tokens_T[begin:end])
            for found, of_piece in zip((labels, labelled), sample.labels(begin, end), strict=True):
                found.append(of_piece)
            filled = offsets[-1]
            offsets += range(filled + self._seq_len, filled + end - begin, self._seq_len)
            offsets.append(filled + end - begin)
            place += 1
        return Pack(
            tokens_T=np.concatenate(tokens),
            labels_T=np.concatenate(labels),
            labelled_T=np.concatenate(labelled),
            positions_T=np.arange(self._pack_len) - np.repeat(offsets[:-1], np.diff(offsets)),
            types_T=np.full(self._pack_len, self._samples.type_id),
            offsets=tuple(offsets),
        )


class PackSequence:
    """The packs of several data sets, one data set after the other; no pack holds two of them.

    Args:
        width: sequences of a pack.
        seed: of the order they are taken in.
    """

    padding = 0

    def __init__(self, packings: Sequence[Packing], width: int = 1, seed: int = 0) -> None:
        self.packings = packings
        self._seed = seed
        self.num_samples = sum(len(packing.ends) for packing in packings)
        self.num_rows = width * sum(map(len, packings))
        self.left_out = sum(packing.left_out for packing in packings)  # tokens that fill no pack
        self.divided = sum(packing.divided for packing in packings)
        self._ends = np.cumsum([len(packing) for packing in packings])
        self.num_tokens = sum(packing.num_tokens for packing in packings)
        self.equal_segments = all(packing.equal_segments for packing in packings)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def in_order(self, number: int) -> int:
        """Return what ``pack`` is asked for to have pack ``number``."""
        return number

    def layout(self) -> tuple[np.ndarray, ...]:
        """Return what says where every sample lies, for a fingerprint."""
        return tuple(packing.ends for packing in self.packings)

    def sampler(self, micro_num: int, rank: int, size: int, num_epochs: int | None) -> PackSampler:
        """Return which packs a data-parallel rank takes at which step, however long the run is."""
        return PackSampler(len(self), micro_num, rank, size, self._seed)

    def pack(self, index: int) -> Pack:
        """Build one pack of one of the data sets."""
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.packings[which].pack(index - int(self._ends[which]) + len(self.packings[which]))
