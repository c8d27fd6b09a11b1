"""Whether a device can hold its rank's share of the model, asked before anything is allocated."""

from dataclasses import replace

from portmoe.accelerator import Accelerator
from portmoe.accelerator.host_memory import host_memory, process_limit
from portmoe.config import Config
from portmoe.config.read import default_model
from portmoe.costs.memory import FP32_BYTES, StateBytes, state_bytes
from portmoe.costs.parameters import count_parameters
from portmoe.errors import BackendError
from portmoe.launch.ranks import Ranks
from portmoe.parallel.layout import Layout
from portmoe.parallel.stages import fullest_rank, rank_parameters


def state_of_rank(config: Config, layout: Layout) -> StateBytes:
    """Bytes of the weights, gradients and optimizer state of the rank that holds most."""
    if config.trainer.engine == "deepspeed":
        return _under_deepspeed(config, layout)
    parameters = rank_parameters(config, fullest_rank(config))
    tensor = 1 if config.parallel.mode == "isp" else layout.tensor
    shards = (layout.zero1, layout.expert, layout.expert_shards)
    state = state_bytes(config, parameters, *shards, tensor, shared=layout.replicas > 1)
    return replace(state, optimizer=state.optimizer // layout.moments)


def _under_deepspeed(config: Config, layout: Layout) -> StateBytes:
    """Weights are float32 too, see ``deepspeed_engine``. Not counted: what stage 3 gathers at a time."""
    stage, whole = config.trainer.deepspeed.zero_stage, FP32_BYTES * count_parameters(config).total
    shard = -(-whole // layout.data)
    return StateBytes(
        weights=shard if stage == 3 else whole,
        masters=shard,
        gradients=whole if stage == 1 else shard,
        optimizer=2 * shard,
    )


def offload_note(config: Config, accelerator: Accelerator) -> list[str]:
    """What is to be said of ``model.checkpoint_offload`` on a device whose memory is the host's."""
    if not (config.model.checkpoint_offload and config.recomputed_layers and accelerator.device.shared):
        return []
    return [
        f"model.checkpoint_offload=true saves nothing on {accelerator.name}, whose memory is the host's: the "
        "inputs of recomputed layers stay where they are"
    ]


def weights_dtype(config: Config) -> str:
    """Name the type of the weights a rank computes with, as it keeps them."""
    return "float32" if config.trainer.engine == "deepspeed" else config.model.dtype


def require_memory(config: Config, layout: Layout, accelerator: Accelerator, ranks: Ranks) -> None:
    """Refuse a model whose state alone is larger than the device, which would end the process unexplained.

    Raises:
        BackendError: it is larger; activations and buffers are not even counted.
    """
    needed = state_of_rank(config, layout).total
    shared = accelerator.device.shared
    available = accelerator.memory.total() // (ranks.local_world_size if shared else 1)
    here = f"{ranks.local_world_size} ranks sharing " if ranks.local_world_size > 1 else ""
    of_what = f", {here}{host_memory()}" if shared else ""
    own = process_limit() if shared else None
    if own is not None and own < available:
        available, of_what = own, ", the limit of one process (ulimit -v, -d)"
    if needed > available:
        raise BackendError(
            f"rank {ranks.rank} ({ranks.host}) needs {needed / 2**30:.1f} GiB for weights, gradients and "
            f"optimizer state, and its share of {accelerator.name} memory is {available / 2**30:.1f} GiB"
            f"{of_what}; use more ranks (parallel.zero1.size: -1 shards over all), set parallel.zero1.fsdp "
            "to true, or choose a smaller model; `portmoe train --dry-run --world-size N` tells for N ranks"
            + "".join(f". Note: {line}" for line in default_model(config))
        )
