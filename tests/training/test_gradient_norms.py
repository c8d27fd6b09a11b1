"""Gradient norms by group and place, against norms taken parameter by parameter."""

import math

import pytest
import torch
import torch.distributed as dist

from portmoe.config.read import load_config
from portmoe.costs.parameters import parameter_groups
from portmoe.model.decoder import Decoder
from portmoe.training.optimizer import Optimizer, place

SMALL = ("model.hidden_size=16", "model.num_layers=3", "model.num_attention_heads=2", "model.multiple_of=16")
EXPECTED_PLACES = {
    "embedding.weight": 0,
    "layers.0.attention.qkv.bias": 1,
    "layers.2.moe.router.weight": 3,
    "norm.weight": 4,
    "head.weight": 4,
}


@pytest.fixture
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "expected"), EXPECTED_PLACES.items())
def test_places(name, expected):
    assert place(name, layers=3) == expected


def test_norms_are_those_of_the_parameters_in_each_place(world):
    config = load_config("tiny_moe4", SMALL)
    model = Decoder(config)
    groups = parameter_groups(model)
    optimizer = Optimizer(groups, adamw=None, config=config.adam, world=world, layers=3, holders=1)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 8.0 * (number + 1))
    norms = optimizer.by_place(optimizer.gradient_norms(loss_scale=8.0))
    assert list(norms) == list(groups)
    for group, parameters in groups.items():
        squares = [0.0] * 5
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if name in parameters:
                before_head = name.split(".")[0] in ("norm", "head")
                where = 4 if before_head else int(name.split(".")[1]) + 1 if name.startswith("layers") else 0
                squares[where] += (number + 1) ** 2 * parameter.numel()
        assert norms[group] == pytest.approx([math.sqrt(s) for s in squares], rel=1e-5)
    assert norms["experts"][0] == norms["experts"][4] == 0
    assert min(norms["experts"][1:4]) > 0


def test_small_numbers_after_large_ones_count(world):
    """As in a head's gradient, whose first rows are the frequent tokens'."""
    config = load_config("tiny_moe4", ("model.num_layers=3",))
    model = Decoder(config)
    groups = parameter_groups(model)
    optimizer = Optimizer(groups, adamw=None, config=config.adam, world=world, layers=3, holders=1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradient = torch.randn(1024, 128, generator=torch.Generator().manual_seed(0)) * 1e-3
    gradient[:8] *= 300
    model.head.weight.grad = gradient
    found = optimizer.gradient_norms(loss_scale=1.0)["head.weight"]
    assert found == pytest.approx(gradient.double().norm().item(), rel=2e-7)
