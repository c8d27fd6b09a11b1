"""What the published families share: keys of config.json, their rotary scaling, and portmoe's defaults."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from portmoe.config.keys import no_effect
from portmoe.config.section import Above0, Count, Layers, ModelSection, NonNegative, Positive, Section, Size
from portmoe.families import architecture as arch

if TYPE_CHECKING:
    from portmoe.config import Config

Zero = Annotated[float, Field(ge=0, le=0)]

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "moe": {"capacity_factor": None, "eval_capacity_factor": None, "min_capacity": 0},
    "loss": {"reduction": "token"},
    "data": {"packing": "cut"},
}


class RopeScaling(Section):
    """Yarn (Peng et al. 2023, arXiv:2309.00071): longer contexts than a model was first trained with."""

    type: Literal["yarn"] = "yarn"
    factor: Annotated[float, Field(ge=1, le=1024.0)] = 1.0
    original_max_position_embeddings: Positive | None = None  # null: max_position_embeddings
    beta_fast: Above0 = 32.0
    beta_slow: Above0 = 1.0
    mscale: NonNegative | None = None
    mscale_all_dim: NonNegative | None = None
    attention_factor: Above0 | None = None  # null: follows from factor, or from both mscales


class PublishedSection(ModelSection):
    """Keys of config.json that all these families have, by their names there."""

    vocab_size: Size = 32000
    hidden_size: Size = 4096
    intermediate_size: Size = 14336
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None  # null: num_attention_heads
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: Positive = 32768
    initializer_range: NonNegative = 0.02
    rms_norm_eps: Above0 = 1e-5
    rope_theta: Above0 = 1e6
    rope_scaling: RopeScaling | None = None
    attention_dropout: Zero = 0.0
    tie_word_embeddings: Literal[False] = False
    sliding_window: Annotated[Count | None, no_effect("attention reaches as far back as the sample")] = None
    use_sliding_window: Literal[False] = False

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width_of_heads(self) -> int:
        """D of a query and a key."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _heads_agree(self) -> "PublishedSection":
        heads, kv_heads = self.num_attention_heads, self.kv_heads
        if heads % kv_heads:
            raise ValueError(
                f"model.num_attention_heads={heads} must be a multiple of "
                f"model.num_key_value_heads={kv_heads}; change one of the two"
            )
        if not getattr(self, "head_dim", None) and self.hidden_size % heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be a multiple of model.num_attention_heads="
                f"{heads}; change one of the two"
            )
        if self.width_of_heads % 2:
            raise ValueError(
                f"a head's width, {self.width_of_heads}, must be even for the rotary embedding; change "
                "model.head_dim, or model.hidden_size / model.num_attention_heads"
            )
        return self


def keys(**of_the_family: str) -> dict[str, str]:
    """``Architecture.keys`` of a published family."""
    return {
        "heads": "model.num_attention_heads",
        "kv_heads": "model.num_key_value_heads",
        "width": "the width of a network",
        "experts": "model.num_experts",
        "top_k": "model.num_experts_per_tok",
        "layers": "model.num_hidden_layers",
        "vocabulary": "model.vocab_size",
    } | of_the_family


def grouped_attention(
    model: PublishedSection, *, bias: bool = False, out_bias: bool = False, normed: bool = False
) -> arch.Attention:
    """Attention with grouped heads and halves of a head turned against each other."""
    return arch.Attention(
        heads=model.num_attention_heads,
        kv_heads=model.kv_heads,
        head_dim=model.width_of_heads,
        value_dim=model.width_of_heads,
        bias=bias,
        out_bias=out_bias,
        rotary=rotary(model),
        norm_epsilon=model.rms_norm_eps if normed else None,
    )


def rotary(model: PublishedSection, interleaved: bool = False) -> arch.Rotary:
    """The rotary embedding, with what yarn makes of it."""
    scaling = model.rope_scaling
    if scaling is None:
        return arch.Rotary(model.rope_theta, interleaved)
    original = scaling.original_max_position_embeddings or model.max_position_embeddings
    yarn = arch.Yarn(
        scaling.factor, original, scaling.beta_fast, scaling.beta_slow, _magnitude_of_tables(scaling)
    )
    return arch.Rotary(model.rope_theta, interleaved, yarn)


def yarn_magnitude(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1: how scores grow with the context, see ``RopeScaling``."""
    return 0.1 * mscale * math.log(factor) + 1.0


def _magnitude_of_tables(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_magnitude(scaling.factor, scaling.mscale) / yarn_magnitude(
            scaling.factor, scaling.mscale_all_dim
        )
    return yarn_magnitude(scaling.factor, 1.0)


def softmax_gate(
    config: "Config",
    top_k: int,
    normalise: bool,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    jitter: float = 0.0,
) -> arch.Gate:
    """The k largest of a softmax; dropless where ``moe.capacity_factor`` is null."""
    moe = config.moe
    factor = moe.capacity_factor
    return arch.Gate(
        "softmax",
        top_k,
        capacity_factor=factor,
        eval_capacity_factor=factor if moe.eval_capacity_factor is None else moe.eval_capacity_factor,
        min_capacity=moe.min_capacity,
        dropless=factor is None,
        normalise=normalise,
        scale=scale,
        groups=groups,
        kept_groups=kept_groups,
        jitter=jitter,
    )


def decoder(
    config: "Config", layers: list[arch.Layer], balance: arch.Balance, names: Mapping[str, str]
) -> arch.Architecture:
    """The decoder around ``layers``; ``names`` is ``Architecture.keys``."""
    model, std = config.model, config.model.initializer_range
    return arch.Architecture(
        vocabulary=model.vocab_size,
        hidden=model.hidden_size,
        layers=tuple(layers),
        norm_epsilon=model.rms_norm_eps,
        exact_norms=config.use_fp32_norm,
        initial=arch.Initial(projection=std, router=std, vocabulary=std),
        nominal_ratio=layers[-1].network.width / model.hidden_size,
        balance=balance,
        keys=names,
    )
