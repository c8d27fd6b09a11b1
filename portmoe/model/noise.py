"""Noise as a function of (run seed, micro-batch, layer) alone.

It is drawn on the CPU from a generator of its own, so that it is the same on every backend, in every
layout and when activations are recomputed, and no global generator state needs saving.
"""

import hashlib

import torch


def micro_batch_seed(run_seed: int, index: int) -> int:
    """The noise seed of micro-batch ``index`` (counted over the whole run and all ranks)."""
    return _hash("micro-batch", run_seed, index)


def layer_generator(noise_seed: int, layer: int) -> torch.Generator:
    """A CPU generator for the noise of one layer in one micro-batch."""
    return torch.Generator().manual_seed(_hash("layer", noise_seed, layer))


def _hash(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # a non-negative int64
