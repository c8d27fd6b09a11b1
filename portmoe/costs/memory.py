"""Bytes one rank needs: model state exactly, activations by an estimate.

Sizes of groups come in as plain numbers; ``parallel.layout`` knows them. Not counted: communication
buffers, the allocator's slack, the transient results of single operations.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

from portmoe.config import Config
from portmoe.costs.outline import outline
from portmoe.costs.parameters import ParameterCount, layer_parameters
from portmoe.model.precision import compute_dtype
from portmoe.model.share import FP32_BYTES, Share


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
    next is not there with ``parallel.weight`` and no overlap. Of experts that are gathered some at a time
    (``moe.expert_in_one_shard``) only those are there.

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
    model = config.architecture
    block = max((layer_parameters(model, kind) for kind in model.kinds), key=lambda count: count.total)
    beside = (block.dense - block.norms) // tensor_ranks + block.norms + block.router
    ends = 2 * model.vocabulary * model.hidden // tensor_ranks
    if expert_ranks == 1:
        expert_shards = shards
    whole = parameters.router + parameters.norms
    rest = (parameters.total - parameters.experts - whole) // tensor_ranks + whole
    each = expert_ranks * tensor_ranks
    weight = config.parallel.weight
    blocks = 1 if weight.size > 1 and not weight.overlap else 2
    experts = blocks * block.experts // each
    if config.expert_shard is not None:
        held = model.experts // expert_ranks
        experts = block.experts // each * config.expert_shard // held
    return _part_bytes(config, rest, exact, shards, ends + blocks * beside, shared) + _part_bytes(
        config, parameters.experts // each, 0, expert_shards, experts, shared
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
    config: Config, share: Share, layers: Iterable[int] | None = None, head: bool = True
) -> int:
    """Bytes kept for the backward pass of one micro-batch by what lies on one rank.

    Counted is what a lean implementation of each operation keeps, as the modules declare it
    (``kept_bytes``), by halves of a block: its input, the norm's output and what is inside. A recomputed
    layer keeps its input; what it needs while it is recomputed is ``recomputed_bytes``. The head keeps a few
    slices of the logits. (The reference cross entropy keeps all of them.)

    The CPU's implementations keep 0.9 to 1.5 times this, less where the experts' hidden rows are computed
    again; the plain references up to 2.5 times.

    Args:
        layers: those on this rank; None: all.
        head: whether the final norm, the head and the loss are on this rank.
    """
    model = config.architecture
    modules, recomputed = outline(model), config.recomputed_layers
    inputs, kept = _input_bytes(config, share), 0
    for place in range(len(model.layers)) if layers is None else layers:
        kept += inputs if place < recomputed else modules.blocks[model.layers[place]].kept_bytes(share)
    if head:
        kept += inputs + modules.head.kept_bytes(share)
    return kept


def recomputed_bytes(config: Config, share: Share, layers: Iterable[int] | None = None) -> int:
    """Bytes of the largest recomputed layer: there once, however many micro-batches are under way."""
    model = config.architecture
    blocks = outline(model).blocks
    at_work = replace(share, regather=False)  # what is gathered while recomputing lives for one backward pass
    places = range(len(model.layers)) if layers is None else layers
    kinds = {model.layers[place] for place in places if place < config.recomputed_layers}
    return max((blocks[kind].kept_bytes(at_work) for kind in kinds), default=0)


def offloaded_bytes(config: Config, share: Share, layers: Iterable[int] | None = None) -> int:
    """Bytes among ``activation_bytes`` that ``model.checkpoint_offload`` moves to the host.

    These are the inputs of the recomputed ones among ``layers`` (None: of all).
    """
    places = range(len(config.architecture.layers)) if layers is None else layers
    recomputed = sum(place < config.recomputed_layers for place in places)
    return recomputed * config.model.checkpoint_offload * _input_bytes(config, share)


def _input_bytes(config: Config, share: Share) -> int:
    """Of a block, or of the head."""
    return share.own * config.architecture.hidden * share.item
