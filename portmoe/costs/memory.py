"""Bytes one rank needs: model state exactly, activations by an estimate.

Sizes of groups come in as plain numbers; ``parallel.layout`` knows them. Not counted: communication
buffers, the allocator's slack, the transient results of single operations.
"""

from dataclasses import astuple, dataclass

from portmoe.config import Config
from portmoe.costs.parameters import ParameterCount, layer_parameters, moe_layers
from portmoe.model.capacity import expert_rows
from portmoe.model.precision import compute_dtype
from portmoe.ops.cross_entropy import kept_bytes

FP32_BYTES = 4
INDEX_BYTES = 8


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank's model state while its micro-batches run."""

    weights: int  # compute copies
    masters: int  # float32 shards the optimizer updates
    gradients: int  # float32, accumulated over the micro-batches
    optimizer: int  # both Adam moments, float32 shards

    @property
    def total(self) -> int:
        return self.weights + self.masters + self.gradients + self.optimizer

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(*(map(sum, zip(astuple(self), astuple(other), strict=True))))


def state_bytes(
    config: Config,
    parameters: ParameterCount,
    shards: int,
    expert_ranks: int = 1,
    expert_shards: int = 1,
    tensor_ranks: int = 1,
    shared: bool = True,
) -> StateBytes:
    """Model state under ZeRO: masters and moments sharded, compute copies and gradients whole.

    The compute copies are separate from the masters, in float32 too, where several ranks share the
    weights; a rank that shares them with no other copies only what it computes with in another dtype. With
    parameters sharded (``parallel.zero1.fsdp``, ``parallel.weight.size``) the gradients are sharded too, and
    compute copies are there of the embedding, the head, and two blocks: the one at work and the next. The
    next is not there with ``parallel.weight`` and no overlap.

    Args:
        parameters: of the part of the model that is here, with all experts of its layers.
        shards: ranks the optimizer state is sharded over.
        expert_ranks: ranks the experts are spread over.
        expert_shards: ranks each of these shards is sharded over again; where the experts are not
            spread, they are sharded as everything else.
        tensor_ranks: ranks all but routers and norms is cut over (a few biases are not cut either, and are
            counted as if they were).
        shared: whether several ranks compute with the same weights.
    """
    exact = parameters.router + (parameters.norms if config.use_fp32_norm else 0)
    block = layer_parameters(config, moe_layers(config) > 0)
    beside = (block.attention + block.dense) // tensor_ranks + block.norms + block.router
    ends = 2 * config.model.vocab_size * config.model.hidden_size // tensor_ranks
    if expert_ranks == 1:
        expert_shards = shards
    whole = parameters.router + parameters.norms
    rest = (parameters.total - parameters.experts - whole) // tensor_ranks + whole
    each = expert_ranks * tensor_ranks
    weight = config.parallel.weight
    blocks = 1 if weight.size > 1 and not weight.overlap else 2
    return _part_bytes(config, rest, exact, shards, ends + blocks * beside, shared) + _part_bytes(
        config, parameters.experts // each, 0, expert_shards, blocks * block.experts // each, shared
    )


def _part_bytes(
    config: Config, parameters: int, exact: int, shards: int, gathered: int, shared: bool
) -> StateBytes:
    """State of a part of the model.

    Args:
        parameters: those this rank computes with.
        exact: those among them whose compute copy is float32 in every dtype.
        gathered: those that are whole at a time where parameters are sharded too.
        shared: whether other ranks compute with them too.
    """
    element = compute_dtype(config.model).itemsize
    sharded = -(-parameters // shards)
    if shared:
        weights = (parameters - exact) * element + exact * FP32_BYTES
    else:
        weights = (parameters - exact) * element if element < FP32_BYTES else 0
    fsdp = shared and config.parallel.gathers_by_block
    return StateBytes(
        weights=min(weights, gathered * element) if fsdp else weights,
        masters=sharded * FP32_BYTES,
        gradients=(sharded if fsdp else parameters) * FP32_BYTES,
        optimizer=2 * sharded * FP32_BYTES,
    )


def activation_bytes(
    config: Config,
    tokens: int,
    head: bool = True,
    tensor_ranks: int = 1,
    sequence_ranks: int = 1,
    input_ranks: int = 1,
) -> int:
    """Bytes kept for the backward pass of one micro-batch, by formula, all layers on this rank.

    Counted is what a lean implementation of each operation keeps, a bytes per activation:

    * attention half: block input, norm output, q, k, v, attention output: 6·H·a; log-sum-exp 4·N;
    * feed-forward half: its input and norm output 2·H·a, then
      dense: gate, up and their product 3·F·a;
      MoE: E·(logits, probabilities) 8, per choice 36 of indices and weights, per row of the experts' buffer
      (2·H + 3·F)·a;
      residual MoE: the dense network, both outputs and their product with the coefficients (3·F + 2·H)·a;
    * a recomputed layer: its input H·a; the largest layer once more while it is recomputed;
    * cut over tensor ranks: q, k, v, attention output, log-sum-exp, and all of width F; where the sequence is
      split between the regions: the inputs of block, feed-forward half, and final norm; where what enters a
      region is gathered again for the backward pass: the norm outputs;
    * head: norm input and output 2·H·a, log-sum-exp 4, and a few slices of the logits. (The reference
      cross entropy keeps all of them: V·(4 + a) more.)

    The CPU's implementations keep 0.9 to 1.5 times this, less where the experts' hidden rows are computed
    again; the plain references up to 2.5 times.

    Args:
        tokens: T, tokens of a micro-batch.
        head: whether the final norm, the head and the loss are on this rank.
        tensor_ranks: ranks that share each layer.
        sequence_ranks: ranks the tokens are split over between the regions they share.
        input_ranks: ranks the inputs of these regions are kept by, a part each.
    """
    model = config.model
    hidden, element = model.hidden_size, compute_dtype(model).itemsize
    with_experts = moe_layers(config)
    dense_layers = model.num_layers - with_experts
    cut = (tensor_ranks, sequence_ranks)
    moe, dense = (_block_bytes(config, tokens, kind, *cut, input_ranks) for kind in (True, False))
    recomputed = model.checkpointed_layers
    recomputed_dense = min(
        recomputed, dense_layers
    )  # the first layers are recomputed, and are the dense ones
    kept = (dense_layers - recomputed_dense) * dense + (with_experts - recomputed + recomputed_dense) * moe
    kept += recomputed * tokens * hidden * element // sequence_ranks
    if recomputed:
        kept += _block_bytes(config, tokens, recomputed > recomputed_dense, *cut, input_ranks=1)
    if head:
        norm = hidden * element // input_ranks + hidden * element // sequence_ranks
        kept += tokens * (norm + FP32_BYTES)
        kept += kept_bytes(tokens, model.vocab_size // tensor_ranks, compute_dtype(model))
    return kept


def _block_bytes(
    config: Config, tokens: int, moe: bool, tensor_ranks: int, sequence_ranks: int, input_ranks: int
) -> int:
    model = config.model
    hidden, width, element = model.hidden_size, model.ffn_width, compute_dtype(model).itemsize
    inside = 2 * hidden * element // input_ranks + 4 * hidden * element // tensor_ranks
    per_token = inside + 2 * hidden * element // sequence_ranks
    per_token += FP32_BYTES * model.num_attention_heads // tensor_ranks
    network = 3 * width * element // tensor_ranks
    if not moe:
        return tokens * (per_token + network)
    per_token += 2 * FP32_BYTES * model.num_experts
    per_token += config.moe.top_k * (4 * INDEX_BYTES + FP32_BYTES)
    if model.moe_use_residual:
        per_token += network + 2 * hidden * element
    return tokens * per_token + expert_rows(config, tokens) * (2 * hidden * element + network)
