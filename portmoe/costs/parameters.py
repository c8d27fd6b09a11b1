"""How many parameters a model has, and which group each belongs to, counted on modules without memory."""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

import torch
from torch import nn

from portmoe.config import Config
from portmoe.costs.outline import outline
from portmoe.families.architecture import Architecture, Experts, Layer
from portmoe.model.decoder import Decoder
from portmoe.model.sharing import Cut, declared_cuts

DEFAULT, FP32, EXPERTS = "default", "fp32", "experts"


def is_exact(module: nn.Module) -> bool:
    """Whether the weights of ``module`` stay float32 in every dtype: it says so itself."""
    return getattr(module, "exact", False)


def exact_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights stay float32 in every dtype: routers, and norms under ``use_fp32_norm``."""
    return [module for module in model.modules() if is_exact(module)]


def spread_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that own parameters which ranks can spread by experts, each once, in order."""
    cuts = declared_cuts(model).items()
    owners = (model.get_submodule(name.rpartition(".")[0]) for name, cut in cuts if cut.expert is not None)
    return list(dict.fromkeys(owners))


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Group name → parameter name → parameter; all three groups, also those without a parameter.

    "experts" are the experts' weights, "fp32" those of ``exact_modules``, "default" all others.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {DEFAULT: {}, FP32: {}, EXPERTS: {}}
    cuts = declared_cuts(model)
    for name, parameter in model.named_parameters():
        exact = is_exact(model.get_submodule(name.rpartition(".")[0]))
        spread = cuts.get(name, Cut()).expert is not None
        groups[EXPERTS if spread else FP32 if exact else DEFAULT][name] = parameter
    return groups


def merged(parts: Iterable[Mapping[str, Mapping[str, nn.Parameter]]]) -> dict[str, dict[str, nn.Parameter]]:
    """The groups of several parts of one model, which share no parameter."""
    groups: dict[str, dict[str, nn.Parameter]] = {DEFAULT: {}, FP32: {}, EXPERTS: {}}
    for part in parts:
        for name, parameters in part.items():
            groups[name].update(parameters)
    return groups


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of a model or of a part of it.

    Attributes:
        active: used for one token: all but the experts it is not sent to.
        router: routers, which are whole and float32 on every rank.
        norms: gains of the norms between the regions of the layers.
    """

    total: int = 0
    active: int = 0
    router: int = 0
    experts: int = 0
    norms: int = 0

    @property
    def dense(self) -> int:
        """All that is neither router nor expert."""
        return self.total - self.router - self.experts

    def __add__(self, other: "ParameterCount") -> "ParameterCount":
        return ParameterCount(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> "ParameterCount":
        return ParameterCount(*(times * number for number in astuple(self)))


def layer_parameters(model: Architecture, layer: Layer) -> ParameterCount:
    """Numbers of one layer."""
    count = _count(outline(model).blocks[layer])
    if not isinstance(layer.network, Experts):
        return count
    used = count.experts * layer.network.gate.top_k // layer.network.count
    return count + ParameterCount(active=used - count.experts)


def embedding_parameters(model: Architecture) -> ParameterCount:
    """Numbers of the embedding."""
    return _count(outline(model).embedding)


def head_parameters(model: Architecture) -> ParameterCount:
    """Numbers of the final norm and the head."""
    return _count(outline(model).norm) + _count(outline(model).head)


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Parameter of the whole model → its shape, in the order of the modules."""
    with torch.device("meta"):
        model = Decoder(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def count_parameters(config: Config) -> ParameterCount:
    """Numbers of the whole model. 7b_moe4: 11,852,320,768 in all, 7,423,135,744 active."""
    model = config.architecture
    count = embedding_parameters(model) + head_parameters(model)
    for layer, places in model.kinds.items():
        count += layer_parameters(model, layer) * len(places)
    return count


def _count(module: nn.Module) -> ParameterCount:
    """Numbers of a module's parameters, all of them active."""
    count, cuts = ParameterCount(), declared_cuts(module)
    for name, parameter in module.named_parameters():
        number, cut = parameter.numel(), cuts.get(name, Cut())
        exact = is_exact(module.get_submodule(name.rpartition(".")[0]))
        count += ParameterCount(
            total=number,
            active=number,
            router=number if exact and cut.inside else 0,
            experts=number if cut.expert is not None else 0,
            norms=number if not cut.inside else 0,
        )
    return count
