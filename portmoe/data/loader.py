"""The micro-batches of one data-parallel rank, step by step, prepared one step ahead."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from portmoe.config import Config
from portmoe.data.batch import Batch
from portmoe.data.packs import Packs, Split, check_vocabulary, open_packs, split_micro_num
from portmoe.data.sources.opened import type_names


class DataStream:
    """What a rank trains or validates on. Close it, or use it in a ``with`` block, to stop its thread.

    Training asks for ``batches``, validation for ``passes``.

    ``steps_per_epoch``: steps until every pack was taken once, see the samplers.
    ``packs``: what it takes from; its own thread reads them.
    ``equal_segments``: every segment has exactly data.seq_len tokens.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        size: int,
        micro_num: int,
        split: Split,
        packs: Packs | None = None,
    ) -> None:
        self._config = config
        micro_num = split_micro_num(config, micro_num, split)
        self.packs = open_packs(config, size, micro_num, split) if packs is None else packs
        self._share = range(rank, micro_num * size, size)  # of the packs that all ranks take at a time
        self._together = micro_num * size
        if split == "train":
            self._sampler = self.packs.sampler(micro_num, rank, size, config.data.num_epochs)
            self.steps_per_epoch = self._sampler.steps_per_epoch
        self._where = getattr(config.data, f"{split}_folder") or "the dummy data"
        self._types = type_names(config, split)
        self.num_packs = len(self.packs)
        self.equal_segments = self.packs.equal_segments
        # One thread does all the reading, so that nothing below needs a lock.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"portmoe-{split}-data")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def batches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of ``step``, counted from 0 at the run's start, on the CPU.

        Any step may be asked for; the one after it is prepared while the caller works. Raises
        ``ConfigError`` if the step meets a token without an embedding or a line that cannot be read.
        """
        if self._ahead is not None and self._ahead[0] == step:
            future = self._ahead[1]
        else:
            self._drop_ahead()
            future = self._thread.submit(self._prepare, step)
        self._ahead = (step + 1, self._thread.submit(self._prepare, step + 1))
        return future.result()

    def passes(self) -> Iterator[list[Batch]]:
        """Yield this rank's share of all packs, in order, as many at a time as ``batches`` returns.

        Ranks that no pack is left for in the last pass get the last one again, without a label.
        """
        packs = range(self.num_packs)
        for first in range(0, self.num_packs, self._together):
            wanted = [first + place for place in self._share]
            yield [
                self._batch(self.packs.in_order(number), number)
                if number in packs
                else self._batch(self.packs.in_order(packs[-1]), number).unlabelled()
                for number in wanted
            ]

    def close(self) -> None:
        """Stop preparing; waits for a step in preparation."""
        self._drop_ahead()
        self._thread.shutdown(wait=True)

    def __enter__(self) -> "DataStream":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None

    def _prepare(self, step: int) -> list[Batch]:
        return list(map(self._batch, self._sampler.step(step), self._sampler.indices(step)))

    def _batch(self, packed: int | Sequence[int], index: int) -> Batch:
        pack = self.packs.pack(packed)
        # The least int64 has no absolute value and stays negative.
        largest = max(int(pack.tokens_T.max()), -int(pack.tokens_T.min()))
        check_vocabulary(self._config, largest, self._where)
        return Batch.from_pack(pack, index, self._types)


def open_data(
    config: Config,
    *,
    rank: int,
    size: int,
    micro_num: int,
    split: Split = "train",
    packs: Packs | None = None,
) -> DataStream:
    """Open what data-parallel rank ``rank`` of ``size`` trains on, or validates on with ``split="valid"``.

    ``micro_num`` is the rank's number of micro-batches per training step; validation takes
    data.valid_micro_num where that is set, and its packs in order. ``packs`` are the split's, where they are
    open already. Raises ``ConfigError`` as ``packs.open_packs`` does.
    """
    return DataStream(config, rank, size, micro_num, split, packs)
