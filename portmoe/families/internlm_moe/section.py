"""The benchmark's ``model`` section, and the architecture it describes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from portmoe.config.section import Count, Experts
from portmoe.families import architecture as arch
from portmoe.families.balance import balance
from portmoe.families.internlm import section as internlm

if TYPE_CHECKING:
    from portmoe.config import Config

MODEL_TYPE = "INTERNLM_MoE"


class ModelConfig(internlm.ModelConfig):
    """The benchmark's names."""

    mlp_ratio: Annotated[float, Field(gt=0, le=1024.0)] = 4 / 3
    num_experts: Experts = 4  # 1: every layer is dense
    first_k_dense_replace: Count = 0  # the first k layers are dense
    moe_type: Literal["GShard", "MegaBlock", "MegaBlock-D"] = "GShard"
    moe_use_residual: bool = False

    @model_validator(mode="after")
    def _layers_agree(self) -> "ModelConfig":
        if self.first_k_dense_replace > self.num_layers:
            raise ValueError(
                f"model.first_k_dense_replace={self.first_k_dense_replace} must be at most "
                f"model.num_layers={self.num_layers}; change one of the two"
            )
        return self

    def is_moe_layer(self, layer: int) -> bool:
        return self.num_experts > 1 and layer >= self.first_k_dense_replace


def architecture(config: "Config") -> arch.Architecture:
    """The decoder of the benchmark."""
    model = config.model
    attention, dense = internlm.attention(model), arch.Dense(model.ffn_width)
    experts = arch.Experts(
        model.num_experts,
        model.ffn_width,
        _gate(config),
        residual=dense if model.moe_use_residual else None,
    )
    number = model.num_layers if model.num_experts == 1 else model.first_k_dense_replace
    layers = [arch.Layer(attention, dense)] * number
    layers += [arch.Layer(attention, experts)] * (model.num_layers - number)
    return internlm.decoder(config, layers, _balance(config))


def _balance(config: "Config") -> arch.Balance:
    """The gate's own loss, which for GShard's gate is the benchmark's."""
    asked = balance(config, arch.Balance("gate", config.loss.moe_loss_coeff))
    return arch.Balance("gate" if asked.over == "first choice" else asked.over, asked.coefficient, asked.z)


def contradictions(config: "Config") -> Iterator[str]:
    """Yield what the kind of gating and the noise asked for contradict each other in."""
    model, moe = config.model, config.moe
    for key, value in (("capacity", moe.capacity_factor), ("eval_capacity", moe.eval_capacity_factor)):
        if value is None:
            yield (
                f"moe.{key}_factor=null, dropless, is not what model.moe_type={model.moe_type!r} does; give "
                "a number, or set model.moe_type to 'MegaBlock-D'"
            )
    if moe.aux_loss == "gshard" and model.moe_type != "GShard":
        yield (
            f"moe.aux_loss='gshard' is the loss of model.moe_type='GShard', and model.moe_type="
            f"{model.moe_type!r}; set moe.aux_loss to 'model' or 'none'"
        )
    if moe.noisy_gate_policy and model.moe_type != "GShard":
        yield (
            f"moe.noisy_gate_policy={moe.noisy_gate_policy!r} acts with model.moe_type='GShard' only, "
            f"and model.moe_type={model.moe_type!r}; set moe.noisy_gate_policy to null"
        )


def _gate(config: "Config") -> arch.Gate:
    moe = config.moe
    return arch.Gate(
        kind="topk" if config.model.moe_type == "GShard" else "megablock",
        top_k=moe.top_k,
        capacity_factor=moe.capacity_factor,
        eval_capacity_factor=moe.eval_capacity_factor,
        min_capacity=moe.min_capacity,
        dropless=config.model.moe_type == "MegaBlock-D",
        drop_tokens=moe.drop_tokens,
        use_rts=moe.use_rts,
        noise=moe.noisy_gate_policy,
        use_fused_gating=moe.use_fused_gating,
    )
