"""Which group a parameter belongs to, and how many parameters a config has.

Counts are closed formulas: they answer at once for any size a config may hold.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from portmoe.config import Config
from portmoe.model.experts import Experts
from portmoe.model.norm import RMSNorm
from portmoe.model.router import Router

DEFAULT, FP32, EXPERTS = "default", "fp32", "experts"


def exact_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights stay float32 in every dtype: routers, and norms under ``use_fp32_norm``."""
    return [module for module in model.modules() if _is_exact(module)]


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Group name → parameter name → parameter; all three groups, also those without a parameter.

    "experts" are the experts' weights, "fp32" those of ``exact_modules``, "default" all others.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {DEFAULT: {}, FP32: {}, EXPERTS: {}}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        group = EXPERTS if isinstance(owner, Experts) else FP32 if _is_exact(owner) else DEFAULT
        groups[group][name] = parameter
    return groups


def merged(parts: Iterable[Mapping[str, Mapping[str, nn.Parameter]]]) -> dict[str, dict[str, nn.Parameter]]:
    """The groups of several parts of one model, which share no parameter."""
    groups: dict[str, dict[str, nn.Parameter]] = {DEFAULT: {}, FP32: {}, EXPERTS: {}}
    for part in parts:
        for name, parameters in part.items():
            groups[name].update(parameters)
    return groups


def _is_exact(module: nn.Module) -> bool:
    return isinstance(module, Router) or (isinstance(module, RMSNorm) and module.exact)


@dataclass(frozen=True)
class LayerParameters:
    """Numbers of parameters of one block."""

    attention: int  # projections with their biases
    norms: int
    router: int
    experts: int  # all of them
    dense: int  # the dense network of a dense layer, or the residual network and its coefficient

    @property
    def total(self) -> int:
        return self.attention + self.norms + self.router + self.experts + self.dense


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of the whole model."""

    total: int
    active: int  # used for one token: all but the experts it is not sent to
    router: int
    experts: int
    norms: int

    @property
    def dense(self) -> int:
        """All that is neither router nor expert."""
        return self.total - self.router - self.experts


def layer_parameters(config: Config, moe: bool) -> LayerParameters:
    """Of a block with (``moe``) or without experts."""
    model = config.model
    hidden, feed_forward = model.hidden_size, 3 * model.hidden_size * model.ffn_width
    residual = feed_forward + 2 * hidden + 2 if model.moe_use_residual else 0
    return LayerParameters(
        attention=4 * hidden * hidden + 4 * hidden,
        norms=2 * hidden,
        router=hidden * model.num_experts if moe else 0,
        experts=model.num_experts * feed_forward if moe else 0,
        dense=residual if moe else feed_forward,
    )


def moe_layers(config: Config) -> int:
    """How many layers have experts."""
    model = config.model
    return model.num_layers - model.first_k_dense_replace if model.num_experts > 1 else 0


def count_parameters(config: Config) -> ParameterCount:
    """Of the whole model. 7b_moe4: 11,852,320,768 in all, 7,423,135,744 active."""
    model = config.model
    with_experts = moe_layers(config)
    moe, dense = layer_parameters(config, moe=True), layer_parameters(config, moe=False)
    experts = with_experts * moe.experts
    ends = 2 * model.vocab_size * model.hidden_size + model.hidden_size
    total = with_experts * moe.total + (model.num_layers - with_experts) * dense.total + ends
    return ParameterCount(
        total=total,
        active=total - experts + experts * config.moe.top_k // model.num_experts,
        router=with_experts * moe.router,
        experts=experts,
        norms=model.num_layers * moe.norms + model.hidden_size,
    )
