"""Collectives counted on real ranks, a step at a time."""

from collections import Counter

import pytest
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import train

from portmoe.training.engine import NativeEngine

GATHER, SCATTER, REDUCE = "_allgather_base_", "_reduce_scatter_base_", "allreduce_"
EXCHANGE = "alltoall_base_"


class Collectives(TorchDispatchMode):
    """Counts c10d's operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))


def counted(directory, *overrides) -> tuple[list[dict[str, int]], int]:
    """Collectives of each step, by name, and the number of parameter groups; runs on a rank."""
    steps, groups, original = [], 0, NativeEngine.train_step

    def train_step(engine, *args, **keywords):
        nonlocal groups
        with Collectives() as collectives:
            outcome = original(engine, *args, **keywords)
        steps.append(dict(collectives.counts))
        groups = sum(isinstance(module, FSDPModule) for module in engine.model.modules())
        return outcome

    NativeEngine.train_step = train_step
    try:
        train(directory, *overrides)
    finally:
        NativeEngine.train_step = original
    return steps, groups


@pytest.fixture
def count(world, tmp_path):
    def of_layout(ranks, *overrides):
        results = world(ranks).call(
            counted, tmp_path / "run", "data.total_steps=3", "parallel.expert.size=1", *overrides
        )
        assert all(result == results[0] for result in results)
        return results[0]

    return of_layout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero1_gathers_and_reduces_each_group_once_a_step(count, dtype):
    # 4 micro-batches a step; in bfloat16 the two routers are groups of their own
    steps, groups = count(2, f"model.dtype={dtype}")
    assert groups == (3 if dtype == "float32" else 5)
    for step in steps:
        assert (step[GATHER], step[SCATTER]) == (groups, groups)
        assert step[REDUCE] == 1  # the gradient norms


def test_subsets_add_one_all_reduce_per_group(count):
    steps, groups = count(4, "parallel.zero1.size=2")
    for step in steps:
        assert (step[GATHER], step[SCATTER], step[REDUCE]) == (groups, groups, groups + 1)


def test_sharded_parameters_are_gathered_for_each_pass(count):
    # 4 micro-batches: both blocks forward and backward, the rest once; every group reduced
    steps, _ = count(2, "parallel.zero1.fsdp=true")
    for step in steps:
        assert (step[GATHER], step[SCATTER]) == (4 * 5, 4 * 3)


def test_experts_spread_over_ranks_add_four_exchanges_per_layer_and_micro_batch(count):
    # 2 layers, 4 micro-batches; rows there and back, forward and backward. No rank holds another's experts,
    # so theirs are neither gathered nor reduced.
    steps, groups = count(2, "parallel.expert.size=2")
    for step in steps:
        assert step[EXCHANGE] == 2 * 4 * 4
        assert (step[GATHER], step[SCATTER]) == (groups - 2, groups - 2)
