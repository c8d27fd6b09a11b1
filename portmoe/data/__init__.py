"""From samples to micro-batches.

The names load on first use: a dry run checks its data without importing torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Batch": "batch",
    "DATA_TYPES": "sources.sample",
    "DataStream": "loader",
    "DummyDataset": "sources.dummy",
    "PackSummary": "length",
    "bad_samples": "packs",
    "check_data": "packs",
    "open_data": "loader",
    "open_splits": "packs",
    "summary": "length",
    "with_total_steps": "length",
}

__all__ = [
    "DATA_TYPES",
    "Batch",
    "DataStream",
    "DummyDataset",
    "PackSummary",
    "bad_samples",
    "check_data",
    "open_data",
    "open_splits",
    "summary",
    "with_total_steps",
]


def __getattr__(name: str) -> Any:
    if name == "dummy":  # portmoe.data.dummy.DummyDataset without an import of its own
        return import_module(f"{__name__}.dummy")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
