"""The keys of DeepSeek-V2's config.json, and the architecture. The defaults are those of the 236B model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from portmoe.config.section import Above0, Count, Experts, Layers, NonNegative, Positive, Size
from portmoe.families import architecture as arch
from portmoe.families import published
from portmoe.families.balance import balance

if TYPE_CHECKING:
    from portmoe.config import Config

MODEL_TYPE = "deepseek_v2"
DEFAULTS = published.DEFAULTS

LATENT_EPSILON = 1e-6  # of the norms of both latents, whatever rms_norm_eps is


class ModelConfig(published.PublishedSection):
    """DeepSeek-V2's names."""

    vocab_size: Size = 102400
    hidden_size: Size = 5120
    intermediate_size: Size = 12288
    num_hidden_layers: Layers = 60
    num_attention_heads: Size = 128
    num_key_value_heads: Size | None = None  # null, or num_attention_heads: every head has its own
    q_lora_rank: Size | None = 1536  # null: queries without a latent
    kv_lora_rank: Size = 512
    qk_nope_head_dim: Size = 128
    qk_rope_head_dim: Size = 64
    v_head_dim: Size = 128
    attention_bias: Literal[False] = False
    moe_intermediate_size: Size = 1536
    n_routed_experts: Experts = 160
    n_shared_experts: Count | None = 2
    num_experts_per_tok: Experts = 6
    first_k_dense_replace: Count = 1
    moe_layer_freq: Positive = 1
    topk_method: Literal["greedy", "group_limited_greedy"] = "group_limited_greedy"
    n_group: Positive | None = 8
    topk_group: Positive | None = 3
    routed_scaling_factor: Above0 = 16.0
    norm_topk_prob: bool = False
    scoring_func: Literal["softmax"] = "softmax"
    aux_loss_alpha: NonNegative = 0.001
    seq_aux: bool = True
    max_position_embeddings: Positive = 163840
    rms_norm_eps: Above0 = 1e-6
    rope_theta: Above0 = 10000.0

    @field_validator("topk_method", mode="before")
    @classmethod
    def _greedy(cls, value: Any) -> Any:
        return "greedy" if value == "gready" else value  # as some copies of the model's code spell it

    @property
    def width_of_heads(self) -> int:
        return self.qk_rope_head_dim  # what the rotary embedding turns

    @property
    def groups(self) -> tuple[int, int]:
        """(groups of experts, those a token may choose from)."""
        if self.topk_method == "greedy":
            return 1, 1
        return self.n_group or 1, self.topk_group or 1

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has one network of ``intermediate_size`` in place of experts."""
        return layer < self.first_k_dense_replace or layer % self.moe_layer_freq != 0


def architecture(config: "Config") -> arch.Architecture:
    """The decoder; the auxiliary loss is a sequence's, or a micro-batch's, in each layer."""
    model, scaling = config.model, config.model.rope_scaling
    magnitude = 1.0
    if scaling is not None and scaling.mscale_all_dim:
        magnitude = published.yarn_magnitude(scaling.factor, scaling.mscale_all_dim)
    width = model.qk_nope_head_dim + model.qk_rope_head_dim
    attention = arch.LatentAttention(
        heads=model.num_attention_heads,
        query_rank=model.q_lora_rank,
        latent_rank=model.kv_lora_rank,
        plain_dim=model.qk_nope_head_dim,
        turned_dim=model.qk_rope_head_dim,
        value_dim=model.v_head_dim,
        rotary=published.rotary(model, interleaved=True),
        scale=width**-0.5 * magnitude**2,
        norm_epsilon=LATENT_EPSILON,
    )
    groups, kept = model.groups
    scale = 1.0 if model.norm_topk_prob else model.routed_scaling_factor
    gate = published.softmax_gate(
        config, model.num_experts_per_tok, model.norm_topk_prob, scale, groups, kept
    )
    width, shared = model.moe_intermediate_size, model.n_shared_experts
    experts = arch.Experts(
        model.n_routed_experts, width, gate, shared=arch.Dense(width * shared) if shared else None
    )
    dense = arch.Dense(model.intermediate_size)
    layers = [
        arch.Layer(attention, dense if model.is_dense(place) else experts)
        for place in range(model.num_hidden_layers)
    ]
    own = arch.Balance("sequence" if model.seq_aux else "layer", model.aux_loss_alpha)
    names = published.keys(experts="model.n_routed_experts", kv_heads="model.num_attention_heads")
    return published.decoder(config, layers, balance(config, own), names)


def contradictions(config: "Config") -> Iterator[str]:
    """Yield what sizes of heads and of groups contradict each other in."""
    model = config.model
    if model.kv_heads != model.num_attention_heads:
        yield (
            f"model.num_key_value_heads={model.num_key_value_heads} must be model.num_attention_heads="
            f"{model.num_attention_heads} with latent attention; leave it null"
        )
    groups, kept = model.groups
    if model.n_routed_experts % groups:
        yield (
            f"model.n_routed_experts={model.n_routed_experts} must be a multiple of model.n_group={groups}; "
            "change one of the two"
        )
    elif not kept <= groups:
        yield f"model.topk_group={kept} must be at most model.n_group={groups}; change one of the two"
    elif model.num_experts_per_tok > model.n_routed_experts // groups * kept:
        yield (
            f"model.num_experts_per_tok={model.num_experts_per_tok} must be at most the "
            f"{model.n_routed_experts // groups * kept} experts of model.topk_group={kept} groups; "
            "change one of them"
        )
