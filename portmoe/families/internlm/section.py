"""The dense benchmark family's ``model`` section, and the architecture it describes."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from portmoe.config.keys import no_effect
from portmoe.config.section import Above0, Layers, ModelSection, NonNegative, Size
from portmoe.families import architecture as arch

if TYPE_CHECKING:
    from portmoe.config import Config

MODEL_TYPE = "INTERNLM"

KEYS = {
    "heads": "model.num_attention_heads",
    "kv_heads": "model.num_attention_heads",
    "width": "the feed-forward width (see model.multiple_of)",
    "experts": "model.num_experts",
    "top_k": "moe.top_k",
    "layers": "model.num_layers",
    "vocabulary": "model.vocab_size",
}


class ModelConfig(ModelSection):
    """The framework's names. The defaults are those of the 7B model."""

    num_attention_heads: Size = 32
    vocab_size: Size = 103168
    hidden_size: Size = 4096
    num_layers: Layers = 32
    mlp_ratio: Annotated[float, Field(gt=0, le=1024.0)] = 8 / 3
    multiple_of: Size = 256  # the feed-forward width is rounded up to a multiple of it
    norm_type: Literal["rmsnorm"] = "rmsnorm"
    layer_norm_epsilon: Above0 = 1e-5
    rope_base: Above0 = 10000.0
    qk_interleaved: bool = False
    embed_grad_scale: NonNegative = 1.0
    apply_post_layer_norm: Literal[False] = False
    embed_split_hidden: Annotated[bool, no_effect("the embedding is split by vocabulary")] = True
    parallel_output: Annotated[bool, no_effect("logits are never gathered")] = True

    @model_validator(mode="after")
    def _sizes_agree(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be a multiple of "
                f"model.num_attention_heads={self.num_attention_heads}; change one of the two"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} / model.num_attention_heads="
                f"{self.num_attention_heads} = {self.head_dim} must be even for the rotary embedding; "
                "change one of the two"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_width(self) -> int:
        """F: int(hidden · mlp_ratio) rounded up to a multiple of ``multiple_of``."""
        return -(-int(self.hidden_size * self.mlp_ratio) // self.multiple_of) * self.multiple_of


def architecture(config: "Config") -> arch.Architecture:
    """The decoder, every layer of it dense."""
    layer = arch.Layer(attention(config.model), arch.Dense(config.model.ffn_width))
    return decoder(config, [layer] * config.model.num_layers, arch.Balance())


def attention(model: ModelConfig) -> arch.Attention:
    """Every head has a key of its own; all projections have biases."""
    return arch.Attention(
        heads=model.num_attention_heads,
        kv_heads=model.num_attention_heads,
        head_dim=model.head_dim,
        value_dim=model.head_dim,
        bias=True,
        out_bias=True,
        rotary=arch.Rotary(model.rope_base, model.qk_interleaved),
    )


def decoder(config: "Config", layers: list[arch.Layer], balance: arch.Balance) -> arch.Architecture:
    """The decoder around ``layers``, with the initial weights the framework prescribes."""
    model = config.model
    return arch.Architecture(
        vocabulary=model.vocab_size,
        hidden=model.hidden_size,
        layers=tuple(layers),
        norm_epsilon=model.layer_norm_epsilon,
        exact_norms=config.use_fp32_norm,
        embedding_gradient=model.embed_grad_scale,
        initial=arch.Initial(projection=0.006, router=0.0015, vocabulary=0.0052, by_depth=True),
        nominal_ratio=model.mlp_ratio,
        balance=balance,
        keys=KEYS,
    )
