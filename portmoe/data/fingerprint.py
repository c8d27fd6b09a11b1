"""What data is, whatever it is called and wherever it lies: counts, and a hash of its packs."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from portmoe.data.packing import PackSequence
from portmoe.data.row_packs import RowPacks

READ = 16  # packs that are read: enough to tell other tokens of the same lengths


def fingerprint(packs: PackSequence | RowPacks) -> dict[str, Any]:
    """Return the counts of samples, tokens and packs, and a hash of every sample's length and of some packs.

    Equal for data whose packs are equal, JSON-ready. Reads the lengths and 16 packs spread over the data.
    """
    digest = hashlib.sha256()
    for array in packs.layout():
        digest.update(np.ascontiguousarray(array).data)
    for index in sorted({len(packs) * i // READ for i in range(READ)}):
        pack = packs.pack(packs.in_order(index))
        for array in (pack.tokens_T, pack.labelled_T, pack.types_T):
            digest.update(np.ascontiguousarray(array).tobytes())
    return {
        "samples": packs.num_samples,
        "tokens": packs.num_tokens,
        "packs": len(packs),
        "sha256": digest.hexdigest()[:32],
    }


def described(data: Mapping[str, Any]) -> str:
    """A fingerprint in words."""
    return f"{data['samples']:,} samples, {data['tokens']:,} tokens ({data['sha256'][:8]})"
