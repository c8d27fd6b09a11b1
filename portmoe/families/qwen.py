"""What the two Qwen families share: which layers have experts, and how tokens choose them."""

from typing import TYPE_CHECKING

from portmoe.config.section import Count, Experts, NonNegative, Positive, Size
from portmoe.families import architecture as arch
from portmoe.families import published
from portmoe.families.balance import balance

if TYPE_CHECKING:
    from portmoe.config import Config


class QwenSection(published.PublishedSection):
    """The keys both have."""

    num_key_value_heads: Size = 4
    moe_intermediate_size: Size = 768
    num_experts: Experts = 128
    num_experts_per_tok: Experts = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: Positive = 1  # layer i has experts where i + 1 is a multiple of it
    mlp_only_layers: list[Count] | None = None  # these have none all the same
    router_aux_loss_coef: NonNegative = 0.001

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has one network of ``intermediate_size`` in place of experts."""
        return layer in (self.mlp_only_layers or ()) or (layer + 1) % self.decoder_sparse_step != 0


def qwen(config: "Config", attention: arch.Attention, shared: arch.Dense | None = None) -> arch.Architecture:
    """The decoder; the auxiliary loss is over all layers' tokens together."""
    model = config.model
    gate = published.softmax_gate(config, model.num_experts_per_tok, model.norm_topk_prob)
    experts = arch.Experts(
        model.num_experts, model.moe_intermediate_size, gate, shared, shared_gate=shared is not None
    )
    dense = arch.Dense(model.intermediate_size)
    layers = [
        arch.Layer(attention, dense if model.is_dense(place) else experts)
        for place in range(model.num_hidden_layers)
    ]
    own = balance(config, arch.Balance("model", model.router_aux_loss_coef))
    return published.decoder(config, layers, own, published.keys())
