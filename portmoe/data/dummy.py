"""The benchmark's dummy data under the name that scripts use."""

from portmoe.data.sources.dummy import DummyDataset

__all__ = ["DummyDataset"]
