"""The benchmark's ``model`` section, and the architecture it describes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from portmoe.config.keys import no_effect
from portmoe.config.section import Above0, Count, Experts, Layers, ModelSection, NonNegative, Size
from portmoe.families import architecture as arch

if TYPE_CHECKING:
    from portmoe.config import Config

MODEL_TYPE = "INTERNLM_MoE"

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
    """The benchmark's names."""

    num_attention_heads: Size = 32
    vocab_size: Size = 103168
    hidden_size: Size = 4096
    num_layers: Layers = 32
    mlp_ratio: Annotated[float, Field(gt=0, le=1024.0)] = 4 / 3
    multiple_of: Size = 256  # the feed-forward width is rounded up to a multiple of it
    num_experts: Experts = 4  # 1: every layer is dense
    first_k_dense_replace: Count = 0  # the first k layers are dense
    moe_type: Literal["GShard", "MegaBlock", "MegaBlock-D"] = "GShard"
    moe_use_residual: bool = False
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
        if self.first_k_dense_replace > self.num_layers:
            raise ValueError(
                f"model.first_k_dense_replace={self.first_k_dense_replace} must be at most "
                f"model.num_layers={self.num_layers}; change one of the two"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_width(self) -> int:
        """F: int(hidden · mlp_ratio) rounded up to a multiple of ``multiple_of``."""
        return -(-int(self.hidden_size * self.mlp_ratio) // self.multiple_of) * self.multiple_of

    @property
    def checkpointed_layers(self) -> int:
        """How many of the layers recompute their activations in the backward pass."""
        return round(self.num_layers * float(self.checkpoint))

    def is_moe_layer(self, layer: int) -> bool:
        return self.num_experts > 1 and layer >= self.first_k_dense_replace


def architecture(config: "Config") -> arch.Architecture:
    """The decoder of the benchmark, with the initial weights it prescribes."""
    model = config.model
    attention = arch.Attention(
        heads=model.num_attention_heads,
        kv_heads=model.num_attention_heads,
        head_dim=model.head_dim,
        value_dim=model.head_dim,
        bias=True,
        out_bias=True,
        rotary=arch.Rotary(model.rope_base, model.qk_interleaved),
    )
    dense = arch.Dense(model.ffn_width)
    experts = arch.Experts(
        model.num_experts,
        model.ffn_width,
        _gate(config),
        residual=dense if model.moe_use_residual else None,
    )
    number = model.num_layers if model.num_experts == 1 else model.first_k_dense_replace
    layers = [arch.Layer(attention, dense)] * number
    layers += [arch.Layer(attention, experts)] * (model.num_layers - number)
    return arch.Architecture(
        vocabulary=model.vocab_size,
        hidden=model.hidden_size,
        layers=tuple(layers),
        norm_epsilon=model.layer_norm_epsilon,
        exact_norms=config.use_fp32_norm,
        embedding_gradient=model.embed_grad_scale,
        initial=arch.Initial(projection=0.006, router=0.0015, vocabulary=0.0052, by_depth=True),
        nominal_ratio=model.mlp_ratio,
        keys=KEYS,
    )


def contradictions(config: "Config") -> Iterator[str]:
    """Yield what the kind of gating and the noise asked for contradict each other in."""
    model, moe = config.model, config.moe
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
