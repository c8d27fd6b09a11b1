"""FLOPs per token in two countings that must not be confused.

``benchmark_flops_per_token`` is the AIChipBenchmark's own figure, kept to the letter so that
logs can be compared: one expert per token, whatever top_k is, of the nominal width, and full attention.
``model_flops_per_token`` counts the products the model really needs, as its modules declare them; a product
with an [m,n] matrix is 2·m·n forward and twice that backward. Neither counts norms, rotary, softmax or the
embedding's look-up.
"""

from portmoe.config import Config
from portmoe.costs.outline import outline
from portmoe.families.architecture import Layer
from portmoe.model.share import one_token


def benchmark_flops_per_token(config: Config, recompute: bool = False) -> float:
    """[3·((8 + 4m)·h² + 4·s·h)·L + 6·h·V] with m = 1.5 · nominal width / h.

    Args:
        recompute: count the forward pass of recomputed layers too; the factor 3 becomes 4 where all are.
    """
    model = config.architecture
    hidden = model.hidden
    layer = (8 + 4 * 1.5 * model.nominal_ratio) * hidden**2 + 4 * config.data.seq_len * hidden
    passes = 3.0 * len(model.layers) + (config.recomputed_layers if recompute else 0)
    return layer * passes + 6.0 * hidden * model.vocabulary


def model_flops_per_token(config: Config, causal: bool = False, recompute: bool = False) -> float:
    """FLOPs the model needs per token, forward and backward.

    Args:
        causal: count only the half of the attention scores that causality leaves.
        recompute: add the forward pass of recomputed layers: work done, not work needed.
    """
    recomputed = config.recomputed_layers if recompute else 0
    flops = 3.0 * head_forward_flops(config)
    for layer, places in config.architecture.kinds.items():
        passes = 3 * len(places) + sum(place < recomputed for place in places)
        flops += passes * layer_forward_flops(config, layer, causal)
    return flops


def layer_forward_flops(config: Config, layer: Layer, causal: bool = False) -> float:
    """FLOPs per token of one layer's forward pass."""
    share = one_token(attended=config.data.seq_len / (2 if causal else 1))
    block = outline(config.architecture).blocks[layer]
    return sum(cost.forward_flops for cost in block.costs(share))


def head_forward_flops(config: Config) -> float:
    """FLOPs per token of the head's forward pass."""
    return sum(cost.forward_flops for cost in outline(config.architecture).head.costs(one_token(0)))
