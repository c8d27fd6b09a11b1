"""Folders of tokenized samples, as ``data.sources.tokenized`` reads them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def folder_of(path: Path, samples: Sequence[Sequence[int]]) -> str:
    """Write ``samples``, of the benchmark's signed tokens, as one .bin file with its .meta."""
    lines = [json.dumps({"tokens": [int(token) for token in tokens]}).encode() + b"\n" for tokens in samples]
    path.mkdir(parents=True)
    (path / "a.bin").write_bytes(b"".join(lines))
    offsets = np.cumsum([0, *map(len, lines[:-1])])
    rows = np.array([(offset, len(tokens)) for offset, tokens in zip(offsets, samples, strict=True)])
    with (path / "a.bin.meta").open("wb") as file:
        np.save(file, rows)
    return str(path)


def conversations(count: int, longest: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random samples of 1 … ``longest`` tokens, a first part of each not learned, as a user's turn."""
    rng = np.random.default_rng(seed)
    lengths = [1, longest, *rng.integers(1, longest + 1, count - 2)]
    samples = [rng.integers(1, vocabulary, length) for length in lengths]
    for tokens in samples:
        tokens[: rng.integers(0, len(tokens) + 1)] *= -1
    return [tokens.tolist() for tokens in samples]
