"""What modules declare of their cuts: everything is declared, and what is not is refused by name."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import portmoe
from portmoe.errors import ConfigError
from portmoe.model import Decoder
from portmoe.model.feed_forward import FeedForward
from portmoe.model.reference_table import reference_table
from portmoe.model.sharing import Cut, declared_cuts
from portmoe.parallel import tensor
from portmoe.parallel.cuts import cut_parameters
from portmoe.parallel.layout import Layout
from portmoe.parallel.mesh import build_meshes
from portmoe.parallel.tensor import Region


def configured(*overrides):
    small = ("model.num_layers=2", "model.first_k_dense_replace=1", "model.moe_use_residual=true")
    return portmoe.load_config("tiny_moe4", (*small, *overrides))


def on_meta(config):
    with torch.device("meta"):
        return Decoder(config)


def test_every_parameter_is_declared_and_every_declaration_is_of_a_parameter():
    """In one of these models: a module may leave a part of it out, as a norm or a latent."""
    used, declared = set(), set()
    models = [configured(), portmoe.load_config("tiny_deepseek_v2", ["model.q_lora_rank=null"])]
    models += map(portmoe.load_config, ("tiny_deepseek_v2", "tiny_qwen2_moe", "tiny_qwen3_moe"))
    for model in map(on_meta, models):
        names = {name for name, _ in model.named_parameters()}
        assert set(declared_cuts(model)) == names
        for path, module in model.named_modules():
            for name in getattr(type(module), "cuts", {}):
                declared.add((type(module), name))
                if f"{path}.{name}".lstrip(".") in names:
                    used.add((type(module), name))
    assert declared == used


@pytest.fixture
def meshes():
    """Those of rank 0 of two that share each layer, and do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield build_meshes(Layout.plan(configured("parallel.tensor.size=2"), 2), "cpu")
    dist.destroy_process_group()


class Unheard(nn.Module):
    """Says nothing of how ranks could share it."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(4, device="meta"))


class Regionless(nn.Module):
    """Is cut, and has no place where ranks would meet."""

    cuts = {"gain": Cut(0)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(4, device="meta"))


@pytest.mark.parametrize("kind", [Unheard, Regionless])
def test_a_module_that_declares_no_cut_or_no_region_is_refused_by_name(kind, meshes):
    model = on_meta(configured())
    model.layers["1"].extra = kind()
    tensor.share(model, Region.of_mode(meshes.tensor, "mtp"))
    with pytest.raises(ConfigError, match=rf"{kind.__name__} \(layers\.1\.extra\) .*'gain'"):
        cut_parameters(model, meshes, weights_are_shared=True)


def test_whole_weights_need_no_declaration(meshes):
    model = on_meta(configured())
    model.layers["1"].extra = Unheard()
    cut_parameters(model, meshes, weights_are_shared=False)
    assert type(model.layers["1"].extra.gain) is nn.Parameter


def test_a_network_inside_a_region_is_no_region_of_its_own(meshes):
    model = on_meta(configured())
    region = Region.of_mode(meshes.tensor, "mtp")
    tensor.share(model, region)
    assert model.layers["0"].feed_forward.region is region
    assert model.layers["1"].moe.region is region
    assert model.layers["1"].moe.residual.region.parts == 1
    alone = FeedForward(8, 16, reference_table())
    assert alone.region.parts == 1
