"""What tests of several rooms share: worlds of ranks, a group of one rank, tiny packages without pip."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Two workers with as many threads as there are cores wait for each other at every barrier; set before torch
# is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from counted_calls import assert_recorded
from worlds import World, records, train

pytest.register_assert_rewrite("agreement", "layout_keys", "run_portmoe")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``install(package, source, group, name)`` puts a one-module package with an entry point on the path.

    This process and its children find it.
    """
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def place(package: str, source: str, group: str, name: str, attribute: str = "accelerator") -> Path:
        (tmp_path / f"{package}.py").write_text(source, encoding="utf-8")
        metadata = tmp_path / f"{package}-1.5.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {package}:{attribute}\n")
        return tmp_path

    return place


# The files that take longest, in the order of what they take. Each stays on one worker for its fixtures, so
# these begin first: a worker that is left alone with one at the end keeps a core idle.
LONGEST = """
parallel/test_layouts simulated/test_training launch/test_launch planning/test_traffic
verify/backend/test_validate_command launch/test_lost_ranks adaptation/test_new_vendor_guide
checkpoint/test_resume cli/test_check_env parallel/test_deepspeed benchmarks/test_benchmarks
parallel/test_weight verify/bisect/test_bisect verify/machine/test_survey cuda/test_interpreted_kernels
simulated/test_on_device simulated/test_wrong_gradients checkpoint/test_resumed_layouts parallel/test_pipeline
verify/backend/test_planted_faults model/test_init checkpoint/test_checkpoint launch/test_launch_lines
planning/test_dry_run training/test_same_numbers profiling/test_profile simulated/test_environment_report
cuda/test_compiled_kernels ops/test_gating config/test_broken_configs ops/test_dispatch_combine
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others as they are."""
    folder = Path(__file__).parent
    rank = {folder / f"{name}.py": place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


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
        assert_recorded(directory, world(ranks).call(train, directory, *overrides))
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


@pytest.fixture
def one_rank():
    """A process group of this process alone; gives the CPU group that norms and metrics need."""
    import torch.distributed as dist

    import portmoe
    from portmoe.launch import launch
    from portmoe.launch.ranks import detect

    device = launch.start(portmoe.get_accelerator("cpu"), detect("local"), 60)
    assert device.type == "cpu"
    yield dist.new_group(backend="gloo")
    launch.stop()
