"""What model a folder of the hub holds, and what training it takes."""

from collections import Counter
from collections.abc import Iterator

from portmoe.checkpoint.hub_files import NAMES
from portmoe.config import Config
from portmoe.config.pretrained import completed
from portmoe.costs.parameters import count_parameters
from portmoe.errors import ConfigError
from portmoe.families.architecture import Architecture, Experts
from portmoe.parallel.layout import Layout
from portmoe.planning.memory_check import state_of_rank
from portmoe.training.hub import Weights, hub_of

RANKS = (1, 8, 16, 32, 64, 128)


def inspect(folder: str) -> str:
    """Family, sizes, parameters, files and memory for training, as text.

    Raises:
        ConfigError: the folder is broken or holds what portmoe does not train.
    """
    config = Config.model_validate(completed({"model": {"from_pretrained": folder}}))
    weights = Weights.of(config)
    parameters = count_parameters(config)
    model = config.model
    rows = [
        ("folder", str(weights.folder.path)),
        ("family", f"{config.model_type} ({hub_of(config).architecture})"),
        ("parameters", f"{parameters.total:,} in all, {parameters.active:,} active per token"),
        *_sizes(config.architecture),
        ("weights", _files(weights)),
        *([("ignored", ", ".join(weights.folder.auxiliary[:4]))] if weights.folder.auxiliary else []),
        *_training(config),
        ("to train it", f"model: {{from_pretrained: {folder}, dtype: {model.dtype}}} and data"),
    ]
    return "\n".join(f"{label:<16} {text}" for label, text in rows)


def _sizes(model: Architecture) -> Iterator[tuple[str, str]]:
    yield "", f"vocabulary {model.vocabulary:,}, hidden {model.hidden:,}, {len(model.layers)} layers"
    for layer, places in model.kinds.items():
        attention, network = layer.attention, layer.network
        heads = f"{attention.heads} heads of {attention.head_dim}, {attention.kv_heads} of keys and values"
        inner = f"dense, width {network.width:,}"
        if isinstance(network, Experts):
            inner = f"{network.count} experts of width {network.width:,}, {network.gate.top_k} per token"
            if network.shared is not None:
                inner += f", and {network.shared.width:,} shared"
        yield "", f"{len(places)} layer{'s' if len(places) > 1 else ''}: {heads}; {inner}"


def _files(weights: Weights) -> str:
    arrays, files = weights.folder.tensors.values(), len(weights.folder.files)
    dtypes = Counter(NAMES[array.dtype] for array in arrays).most_common()
    kinds = ", ".join(f"{number:,} {name}" for name, number in dtypes)
    return f"{files} file{'s' if files > 1 else ''}, {_size(weights.folder.bytes)}: {kinds} tensors"


def _training(config: Config) -> Iterator[tuple[str, str]]:
    """Model state by number of ranks, where a layout of so many is possible."""
    yield "training", "weights, gradients and optimizer state per rank, without activations:"
    zero1 = config.parallel.zero1
    for ranks in RANKS:
        found = []
        for sharded in (False, True):
            parallel = config.parallel.model_copy(
                update={"zero1": zero1.model_copy(update={"fsdp": sharded})}
            )
            asked = config.model_copy(update={"parallel": parallel})
            try:
                state = state_of_rank(asked, Layout.plan(asked, ranks))
            except ConfigError:
                continue
            found.append(f"{_size(state.total)} with parallel.zero1.fsdp {'true' if sharded else 'false'}")
        if found:
            yield "", f"{ranks} rank{'s' if ranks > 1 else ''}: {', '.join(found)}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
