"""Worlds of ranks shared by the tests, and the single-process runs they are compared with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import World, records, train


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """``world(n)``: n ranks, started when first asked for."""
    worlds: dict[int, World] = {}

    def of_size(size: int) -> World:
        if size not in worlds or not worlds[size].alive:
            worlds[size] = World(size)
        return worlds[size]

    yield of_size
    for started in worlds.values():
        started.end()


@pytest.fixture(scope="session")
def run(world, tmp_path_factory) -> Callable[..., list[dict[str, Any]]]:
    """``run(ranks, *overrides, directory=None)``: the records of a run of the small model."""

    def one(ranks: int, *overrides: str, directory: Path | None = None) -> list[dict[str, Any]]:
        directory = directory or tmp_path_factory.mktemp("run") / "run"
        world(ranks).call(train, directory, *overrides)
        return records(directory)

    return one


@pytest.fixture(scope="session")
def alone(run) -> Callable[..., list[dict[str, Any]]]:
    """``alone(*overrides)``: the records of one process; each set of overrides is run once."""
    known: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def one(*overrides: str) -> list[dict[str, Any]]:
        if overrides not in known:
            known[overrides] = run(1, *overrides)
        return known[overrides]

    return one
