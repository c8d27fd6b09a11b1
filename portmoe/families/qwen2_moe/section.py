"""The keys of Qwen2-MoE's config.json, and the architecture. The defaults are those of Qwen1.5-MoE-A2.7B."""

from typing import TYPE_CHECKING

from portmoe.config.section import Above0, Experts, Positive, Size
from portmoe.families import architecture as arch
from portmoe.families import published
from portmoe.families.qwen import QwenSection, qwen

if TYPE_CHECKING:
    from portmoe.config import Config

MODEL_TYPE = "qwen2_moe"
DEFAULTS = published.DEFAULTS


class ModelConfig(QwenSection):
    """Qwen2-MoE's names."""

    vocab_size: Size = 151936
    hidden_size: Size = 2048
    intermediate_size: Size = 5632
    num_hidden_layers: Positive = 24
    num_attention_heads: Size = 16
    num_key_value_heads: Size = 16
    moe_intermediate_size: Size = 1408
    shared_expert_intermediate_size: Size = 5632
    num_experts: Experts = 60
    num_experts_per_tok: Experts = 4
    qkv_bias: bool = True
    max_position_embeddings: Positive = 8192
    rms_norm_eps: Above0 = 1e-6


def architecture(config: "Config") -> arch.Architecture:
    """The decoder: q, k and v have biases."""
    model = config.model
    attention = published.grouped_attention(model, bias=model.qkv_bias)
    return qwen(config, attention, arch.Dense(model.shared_expert_intermediate_size))
