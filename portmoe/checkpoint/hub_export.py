"""A checkpoint turned into a folder of the hub by one process: streamed, a few MiB in memory at a time."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from portmoe.checkpoint.arrays import BLOCK_BYTES, Files, StoredArray
from portmoe.checkpoint.chunks import Chunks
from portmoe.checkpoint.hub_layout import Piece, pieces
from portmoe.checkpoint.hub_write import Target
from portmoe.errors import TrainingError
from portmoe.families.hub import Made


def export(
    checkpoint: Path,
    target: Target,
    shapes: Mapping[str, tuple[int, ...]],
    made: Mapping[str, Made],
    progress: Callable[[str, int, int], None],
) -> None:
    """Write the weights of ``checkpoint`` into ``target``.

    Args:
        shapes: of the parameters, by name.
        progress: told what is done now, and how many of how many parameters are.

    Raises:
        ConfigError: it is no checkpoint, or one of another model.
        TrainingError: it is damaged, or the folder cannot be written; nothing is left of it then.
    """
    progress("checksums", 0, len(shapes))
    chunks = Chunks(checkpoint, shapes)
    try:
        target.begin()
        with Files() as sources, target.filled() as files:
            for number, (name, shape) in enumerate(shapes.items()):
                progress(name, number, len(shapes))
                for part, stored in chunks.of(name):
                    for piece in pieces(made[name], shape, part):
                        _copy(stored, sources, piece, target.arrays[piece.tensor], files)
        target.finish()
    except TrainingError:
        target.abandon()
        raise


def _copy(source: StoredArray, sources: Files, piece: Piece, target: StoredArray, files: Files) -> None:
    """Copy one piece, some rows of the hub's tensor at a time."""
    box = [slice(place, place + 1) if isinstance(place, int) else place for place in piece.here]
    rows = len(box) - len(piece.there)  # the dimension of the source that is the target's first
    width = math.prod(part.stop - part.start for part in piece.there[1:])
    lines = max(1, BLOCK_BYTES // (width * source.dtype.itemsize))
    begin, end = piece.there[0].start, piece.there[0].stop
    for first in range(begin, end, lines):
        last = min(first + lines, end)
        box[rows] = slice(piece.here[rows].start + first - begin, piece.here[rows].start + last - begin)
        there = (slice(first, last), *piece.there[1:])
        block = torch.empty([part.stop - part.start for part in there], dtype=source.dtype)
        source.read(sources, tuple(box), block.view([part.stop - part.start for part in box]))
        target.write(files, there, block)
