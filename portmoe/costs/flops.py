"""FLOPs per token in two countings that must not be confused.

``benchmark_flops_per_token`` is the AIChipBenchmark's figure for InternLM MoE, kept to the letter so that
logs can be compared: one expert per token, whatever top_k is, of width hidden·mlp_ratio, and full attention.
``model_flops_per_token`` counts the products the model really needs: top_k experts at their real width,
router, dense and residual networks; a product with an [m,n] matrix is 2·m·n forward and twice that backward.
Neither counts norms, rotary, softmax or the embedding's look-up.
"""

from portmoe.config import Config
from portmoe.costs.parameters import moe_layers


def benchmark_flops_per_token(config: Config, recompute: bool = False) -> float:
    """[3·((8 + 4m)·h² + 4·s·h)·L + 6·h·V] with m = 1.5·mlp_ratio.

    Args:
        recompute: count the forward pass of recomputed layers too; the factor 3 becomes 4 where all are.
    """
    model = config.model
    hidden, width = model.hidden_size, 1.5 * model.mlp_ratio
    layer = (8 + 4 * width) * hidden**2 + 4 * config.data.seq_len * hidden
    return layer * _passes(config, recompute) + 6.0 * hidden * model.vocab_size


def model_flops_per_token(config: Config, causal: bool = False, recompute: bool = False) -> float:
    """FLOPs the model needs per token, forward and backward.

    Args:
        causal: count only the half of the attention scores that causality leaves.
        recompute: add the forward pass of recomputed layers: work done, not work needed.
    """
    model = config.model
    share = moe_layers(config) / model.num_layers
    moe, dense = (layer_forward_flops(config, kind, causal) for kind in (True, False))
    layer = share * moe + (1 - share) * dense
    return layer * _passes(config, recompute) + 3.0 * head_forward_flops(config)


def layer_forward_flops(config: Config, moe: bool, causal: bool = False) -> float:
    """FLOPs per token of one block's forward pass, with (``moe``) or without experts."""
    model = config.model
    hidden, attended = model.hidden_size, config.data.seq_len / (2 if causal else 1)
    feed_forward = 3 * hidden * model.ffn_width
    attention = 2 * (4 * hidden * hidden) + 4 * attended * hidden
    if not moe:
        return attention + 2 * feed_forward
    experts = 2 * (hidden * model.num_experts + config.moe.top_k * feed_forward)
    if model.moe_use_residual:
        experts += 2 * (feed_forward + 2 * hidden)
    return attention + experts


def head_forward_flops(config: Config) -> float:
    """FLOPs per token of the head's forward pass."""
    return 2.0 * config.model.hidden_size * config.model.vocab_size


def _passes(config: Config, recompute: bool) -> float:
    """Forward-equivalents summed over the layers: 3 each, 4 where activations are recomputed."""
    return 3.0 * config.model.num_layers + (config.model.checkpointed_layers if recompute else 0)
