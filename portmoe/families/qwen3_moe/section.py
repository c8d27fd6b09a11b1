"""The keys of Qwen3-MoE's config.json, and the architecture. The defaults are those of Qwen3-30B-A3B."""

from typing import TYPE_CHECKING

from portmoe.config.section import Above0, Positive, Size
from portmoe.families import architecture as arch
from portmoe.families import published
from portmoe.families.qwen import QwenSection, qwen

if TYPE_CHECKING:
    from portmoe.config import Config

MODEL_TYPE = "qwen3_moe"
DEFAULTS = published.DEFAULTS


class ModelConfig(QwenSection):
    """Qwen3-MoE's names."""

    vocab_size: Size = 151936
    hidden_size: Size = 2048
    intermediate_size: Size = 6144
    num_hidden_layers: Positive = 48
    head_dim: Size | None = 128  # null: hidden_size / num_attention_heads
    norm_topk_prob: bool = True
    attention_bias: bool = False
    max_position_embeddings: Positive = 40960
    rms_norm_eps: Above0 = 1e-6


def architecture(config: "Config") -> arch.Architecture:
    """The decoder: each head's query and key are normed before they are turned."""
    model = config.model
    bias = model.attention_bias
    return qwen(config, published.grouped_attention(model, bias=bias, out_bias=bias, normed=True))
