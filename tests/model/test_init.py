"""Initial values: the listed distributions, and the same numbers whatever part of them a rank holds."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from portmoe.accelerator import gloo
from portmoe.config import Config
from portmoe.model import Decoder, MoELayer, initialise


def make_config(seed=1024, **model) -> Config:
    sizes = {
        "dtype": "float32",
        "hidden_size": 96,
        "num_attention_heads": 4,
        "num_layers": 3,
        "vocab_size": 2000,
        "multiple_of": 64,
    }
    return Config.model_validate({"run": {"seed": seed}, "model": sizes | model, "data": {"seq_len": 8}})


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(make_config(moe_use_residual=True, first_k_dense_replace=1))


def expected_std(name: str) -> float | None:
    """The benchmark's list; None: constant."""
    layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
    if "norm" in name or name.endswith("bias"):
        return None
    if name in ("embedding.weight", "head.weight"):
        return 0.0052
    if "router" in name:
        return 0.0015
    if "attention.out" in name or "w2" in name:
        return 0.006 / (2 * (layer + 1)) ** 0.5
    return 0.006


def test_every_parameter_has_its_distribution(model):
    for name, parameter in model.named_parameters():
        std, values = expected_std(name), parameter.detach().double()
        if std is None:
            assert (values == (1.0 if "norm" in name else 0.0)).all(), name
            continue
        count = values.numel()
        assert values.mean().abs() < 5 * std / count**0.5, name
        assert (values.std() / std - 1).abs() < 5 / (2 * count) ** 0.5, name
        if count > 20_000:  # a normal distribution's fourth moment is 3 σ⁴
            assert ((values / std).pow(4).mean() - 3).abs() < 5 * (96 / count) ** 0.5, name


def test_no_two_parameters_or_blocks_or_seeds_share_their_numbers(model):
    firsts = [p.flatten()[:4] / p.std() for n, p in model.named_parameters() if expected_std(n)]
    for one, two in itertools.combinations(firsts, 2):
        assert not torch.allclose(one, two)
    rows = model.embedding.weight.detach()
    assert len(rows.unique(dim=0)) == len(rows)
    other = Decoder(make_config(seed=1025)).embedding.weight
    assert (other != rows).float().mean() > 0.99


def test_the_numbers_of_a_seed_are_these(model):
    """A run must be repeatable years later: a change here is a change of every run's start."""
    first, last = model.embedding.weight[0, :3].tolist(), model.embedding.weight[1999, -3:].tolist()
    assert first == pytest.approx([-0.007486267946660519, 0.007973059080541134, 0.008770634420216084])
    assert last == pytest.approx([0.001221643527969718, -0.0002861045941244811, 0.00546274846419692])


def test_a_layer_alone_has_the_decoders_values(model):
    layer = MoELayer(model.config, layer=2)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, model.get_parameter(f"layers.2.moe.{name}"))


def test_a_stage_has_the_whole_models_values():
    config = make_config()
    whole, stage = Decoder(config).state_dict(), Decoder(config, layers=[1, 2], embed=False).state_dict()
    for name, value in stage.items():
        assert torch.equal(value, whole[name]), name


def test_lower_precision_is_the_float32_value_rounded():
    config = make_config()
    whole, half = Decoder(config), Decoder(config).to(torch.bfloat16)
    initialise(half, config)
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name).to(torch.bfloat16))


class Weights(nn.Module):
    """Parameters under names of the model: uneven rows and columns, several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.ParameterDict({"weight": torch.zeros(1501, 98)})
        self.head = nn.ParameterDict({"weight": torch.zeros(7, 70_000)})  # a block is one row
        self.norm = nn.ParameterDict({"weight": torch.zeros(5)})
        self.experts = nn.ParameterDict({"w1": torch.zeros(3, 401, 98)})  # blocks reach over experts


def whole_weights() -> dict[str, torch.Tensor]:
    weights = Weights()
    initialise(weights, make_config())
    return {name: p.detach() for name, p in weights.named_parameters()}


def test_a_stack_of_matrices_has_the_numbers_of_one_tall_matrix():
    tall = Weights()
    tall.experts["w1"] = nn.Parameter(torch.zeros(3 * 401, 98))
    initialise(tall, make_config())
    assert torch.equal(whole_weights()["experts.w1"].flatten(0, 1), tall.experts["w1"])


def chunk(tensor: torch.Tensor, dim: int, parts: int, index: int) -> torch.Tensor:
    """What Shard(dim) leaves part ``index``; nothing where there are more parts than rows."""
    pieces = tensor.chunk(parts, dim)
    return pieces[index] if index < len(pieces) else tensor.narrow(dim, 0, 0)


LAYOUTS = {
    "rows": ((4,), (Shard(0),)),
    "columns": ((3,), (Shard(1),)),
    "rows over more ranks than rows": ((8,), (Shard(0),)),
    "replicated, rows": ((2, 2), (Replicate(), Shard(0))),
    "rows, columns": ((2, 3), (Shard(0), Shard(1))),
    "rows of rows": ((2, 2), (Shard(0), Shard(0))),
}


@pytest.fixture
def pretended_world():
    """Rank 0 of eight that do not exist; a mesh that lists it elsewhere gives it any place."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("pretended_world")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_place_in_a_layout_holds_its_part_of_the_same_values(layout):
    shape, placements = LAYOUTS[layout]
    whole = whole_weights()
    for place in range(torch.Size(shape).numel()):
        ranks = torch.arange(torch.Size(shape).numel()).roll(place).view(shape)
        mesh = DeviceMesh("cpu", ranks)
        weights = Weights()
        for owner, key in ((weights.embedding, "weight"), (weights.head, "weight"), (weights.experts, "w1")):
            sharded = distribute_tensor(owner[key].detach(), mesh, placements, src_data_rank=None)
            owner[key] = nn.Parameter(sharded)
        initialise(weights, make_config())
        coordinate = (ranks == 0).nonzero()[0].tolist()
        for name, parameter in weights.named_parameters():
            expected = whole[name]
            if isinstance(parameter, DTensor):
                for size, placement, at in zip(shape, placements, coordinate, strict=True):
                    if isinstance(placement, Shard):
                        expected = chunk(expected, placement.dim, size, at)
                parameter = parameter.to_local()
            assert torch.equal(parameter, expected), (place, name)


def shard_and_compare(rank: int, world: int, rendezvous: str) -> None:
    """In a process of its own: the model sharded as the trainer does it, gathered, against the whole."""
    from torch.distributed.fsdp import fully_shard

    gloo.use_one_worker()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    config = make_config(num_layers=2)
    mesh = init_device_mesh("cpu", (world,))
    with torch.device("meta"):
        sharded = Decoder(config)
    for block in sharded.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    initialise(sharded, config)  # nothing to do yet: the parameters have no memory
    sharded.to_empty(device="cpu")
    initialise(sharded, config)
    for name, parameter in Decoder(config).named_parameters():
        part = sharded.get_parameter(name)
        assert part.to_local().numel() * world == parameter.numel(), name
        assert torch.equal(part.full_tensor(), parameter), name
    dist.destroy_process_group()


def test_one_real_rank_holds_the_whole_models_values(tmp_path):
    shard_and_compare(0, 1, str(tmp_path / "rendezvous"))


def test_two_real_ranks_hold_the_whole_models_values(tmp_path):
    mp.spawn(shard_and_compare, (2, str(tmp_path / "rendezvous")), nprocs=2)
