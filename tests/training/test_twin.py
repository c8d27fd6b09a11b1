"""Twins: every weight moved by one unit in its last place, alike in every layout."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from portmoe.cli.train import _of_twin
from portmoe.config.read import load_config
from portmoe.training.twin import move


def moved(weights, dtype, twin=1):
    tensors = {"weight": weights.clone()}
    move(tensors, dtype, twin)
    return tensors["weight"]


def test_in_float32_each_weight_becomes_its_neighbour():
    weights = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    found, values = moved(weights, torch.float32).numpy(), weights.numpy()
    up, down = np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))
    inside = np.abs(np.frexp(values)[0]) != 0.5  # a power of two has its neighbours at two distances
    assert (((found == up) | (found == down)) | ~inside).all()
    assert 0.4 < (found > values).mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_a_16_bit_type_it_moves_by_one_unit_of_that_type(dtype):
    weights = torch.rand(64, 32, generator=torch.Generator().manual_seed(0)).mul(0.4).add(0.55).to(dtype)
    found = moved(weights.float(), dtype).to(dtype)
    steps = found.view(torch.int16).int() - weights.view(torch.int16).int()
    assert steps.abs().unique().tolist() == [1]
    assert 0.4 < (steps > 0).float().mean() < 0.6


def test_constants_move_both_ways_zeros_stay_and_twins_differ():
    gains, twin1 = torch.ones(256), moved(torch.ones(256), torch.bfloat16)
    assert 0.3 < (twin1 > gains).float().mean() < 0.7
    assert not torch.equal(twin1, moved(gains, torch.bfloat16, twin=2))
    assert torch.equal(moved(torch.zeros(3), torch.float32), torch.zeros(3))


@pytest.mark.parametrize("dimension", [0, 1])
def test_a_part_moves_as_the_whole_does(dimension):
    whole = torch.ones(6, 64)  # where only the place tells weights apart
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        part = DTensor.from_local(whole.chunk(2, dimension)[1].clone(), mesh, [Shard(dimension)])
        move({"weight": part}, torch.float32, 1)
        assert torch.equal(part.to_local(), moved(whole, torch.float32).chunk(2, dimension)[1])
    finally:
        dist.destroy_process_group()


def test_a_twin_parts_from_its_run_by_rounding(alone):
    short = "data.total_steps=3"
    runs = alone(short), alone(short, "run.twin=1")
    plain, twin = ([step["grad_norm/default"] for step in steps] for steps in runs)
    assert twin == pytest.approx(plain, rel=1e-5)
    assert twin != plain


def test_the_command_of_a_run_makes_its_twin_beside_it():
    given = _of_twin("tiny_moe4", ("run.directory=runs/here",), 2)
    run = load_config("tiny_moe4", given).run
    assert (run.twin, run.directory) == (2, "runs/here-twin2")
    assert load_config("tiny_moe4", _of_twin("tiny_moe4", (), 2)).run.directory is None
