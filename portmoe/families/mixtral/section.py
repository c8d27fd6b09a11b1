"""The keys of Mixtral's config.json, and the architecture they describe. The defaults are those of 8x7B."""

from typing import TYPE_CHECKING

from portmoe.config.section import Experts, Fraction, NonNegative, Size
from portmoe.families import architecture as arch
from portmoe.families import published
from portmoe.families.balance import balance

if TYPE_CHECKING:
    from portmoe.config import Config

MODEL_TYPE = "mixtral"
DEFAULTS = published.DEFAULTS


class ModelConfig(published.PublishedSection):
    """Mixtral's names."""

    num_key_value_heads: Size = 8
    head_dim: Size | None = None  # null: hidden_size / num_attention_heads
    num_local_experts: Experts = 8
    num_experts_per_tok: Experts = 2
    router_aux_loss_coef: NonNegative = 0.02
    router_jitter_noise: Fraction = 0.0


def architecture(config: "Config") -> arch.Architecture:
    """The decoder; the auxiliary loss is over all layers' tokens together."""
    model = config.model
    gate = published.softmax_gate(
        config, model.num_experts_per_tok, normalise=True, jitter=model.router_jitter_noise
    )
    experts = arch.Experts(model.num_local_experts, model.intermediate_size, gate)
    layer = arch.Layer(published.grouped_attention(model), experts)
    own = balance(config, arch.Balance("model", model.router_aux_loss_coef))
    names = published.keys(experts="model.num_local_experts", width="model.intermediate_size")
    return published.decoder(config, [layer] * model.num_hidden_layers, own, names)
