"""What training a config takes, worked out without allocating the model."""

from collections.abc import Iterator
from itertools import takewhile

import torch

from portmoe.accelerator import Accelerator, get_accelerator
from portmoe.config import Config
from portmoe.config.read import default_model, no_effect_notes
from portmoe.costs.flops import benchmark_flops_per_token, model_flops_per_token
from portmoe.costs.memory import activation_bytes, offloaded_bytes, recomputed_bytes
from portmoe.costs.parameters import count_parameters
from portmoe.data import summary
from portmoe.data.packs import open_packs
from portmoe.errors import BackendError, ConfigError
from portmoe.ops import OPERATIONS, choose
from portmoe.parallel.layout import Layout, most_ranks
from portmoe.parallel.stages import describe, in_flight, stages_of
from portmoe.parallel.workload import call_sites, share_of
from portmoe.planning.memory_check import offload_note, state_of_rank, weights_dtype
from portmoe.record.acceptance import out_of_reach
from portmoe.record.progress import told_when_due


def dry_run(config: Config, config_name: str, backend: str, world_size: int) -> str:
    """Parameters, layout, batch, memory per rank, FLOPs per token and chosen operations, as text.

    Raises:
        ConfigError: the layout is impossible on ``world_size`` ranks, or ``ops.disable`` names nothing.
        BackendError: the backend is not usable here, or ``ops.fallback`` is "error" and something is missing.
    """
    layout = Layout.plan(config, world_size)
    accelerator = get_accelerator(backend)
    config, data = _data(config, layout)
    said = [*default_model(config), *filter(None, [out_of_reach(config)]), *no_effect_notes(config)]
    said += offload_note(config, accelerator)
    notes = [f"note: {note}" for note in said]
    operations = list(_operations(config, layout, accelerator, notes))
    rows = [
        ("config", config_name),
        ("backend", accelerator.name),
        *_sizes(config, layout),
        *data,
        *_pipeline(config, layout),
        *_memory(config, layout, accelerator),
        *_communication(config, layout),
        *_flops(config),
        *operations,
    ]
    return "\n".join([*(f"{label:<16} {text}" for label, text in rows), *notes])


def _sizes(config: Config, layout: Layout) -> Iterator[tuple[str, str]]:
    parameters = count_parameters(config)
    yield "parameters", f"{parameters.total:,} in all, {parameters.active:,} active per token"
    yield "layout", str(layout)
    yield (
        "global batch",
        f"{layout.global_batch_sequences} sequences = {layout.micro_bsz} data.micro_bsz · {layout.micro_num} "
        f"micro_num · {layout.data} data-parallel ranks; {layout.tokens_per_step:,} tokens per step",
    )
    limit, ranks = config.data.max_global_batch_size, most_ranks(config)
    if ranks is not None:
        yield "", f"data.max_global_batch_size {limit} allows at most {ranks} ranks with this micro_num"


def _data(config: Config, layout: Layout) -> tuple[Config, list[tuple[str, str]]]:
    """The config with its number of steps, and how full packs are, where the steps are the data's to say."""
    if config.data.num_epochs is None:
        return config, []
    sizes = layout.data, layout.micro_num
    try:
        with told_when_due("parts") as told:
            packs = open_packs(config, *sizes, told=told)
    except (ConfigError, BackendError) as error:
        return config, [("data", f"cannot be looked at: {error}")]
    found = summary(config, packs, *sizes)
    data = config.data.model_copy(update={"total_steps": found.total_steps})
    return config.model_copy(update={"data": data}), [("data", str(found))]


def _memory(config: Config, layout: Layout, accelerator: Accelerator) -> Iterator[tuple[str, str]]:
    state = state_of_rank(config, layout)
    moves = not accelerator.device.shared
    activations, offloaded = _activations(config, layout, moves)
    share = f"1/{layout.zero1} of the" if layout.zero1 > 1 else "all"
    each = layout.expert * layout.expert_shards
    if layout.expert > 1 and each != layout.zero1:
        share += f" dense and 1/{each} of the experts'"
    yield (
        "memory per rank",
        f"weights {_size(state.weights)} ({weights_dtype(config)}) + {_size(state.masters)} "
        f"({share} float32 masters)",
    )
    yield "", f"gradients {_size(state.gradients)} (float32, summed over the micro-batches)"
    if layout.moments > 1:
        share = f"1/{layout.zero1 * layout.moments} of the"
    yield "", f"optimizer {_size(state.optimizer)} ({share} Adam moments, float32)"
    tokens = layout.tokens_per_micro_batch
    held = "one micro-batch" if layout.pipeline == 1 else "the micro-batches under way, each"
    yield "", f"activations {_size(activations)} (estimate for {held} of {tokens} tokens)"
    if offloaded:
        yield (
            "",
            f"beside these {_size(offloaded)} in host memory (inputs of layers, model.checkpoint_offload)",
        )
    yield "", f"together {_size(state.total + activations)}, without communication buffers and workspaces"


def _activations(config: Config, layout: Layout, moves: bool) -> tuple[int, int]:
    """Bytes of the fullest rank: what its layers keep for every micro-batch under way, the rest for one.

    With them what waits in host memory, if the device ``moves`` anything there.
    """
    chunks, share = config.model.num_chunks, share_of(config, layout, torch.device("meta"))
    head = activation_bytes(config, share, layers=())
    held = []
    for rank in range(layout.pipeline):
        stages = stages_of(config, rank)
        places = [place for stage in stages for place in stage.layers]
        moved = offloaded_bytes(config, share, places) if moves else 0
        layers = activation_bytes(config, share, places, head=False) - moved
        under_way = in_flight(layout, chunks, rank) / chunks
        once = recomputed_bytes(config, share, places) + head * stages[-1].head
        held.append((round(layers * under_way) + once, round(moved * under_way)))
    return max(held)


def _pipeline(config: Config, layout: Layout) -> Iterator[tuple[str, str]]:
    if layout.pipeline > 1:
        yield "pipeline", describe(config, layout)


def _communication(config: Config, layout: Layout) -> Iterator[tuple[str, str]]:
    if layout.world == 1:
        return
    if config.trainer.engine == "deepspeed":
        yield "communication", "DeepSpeed's own, not counted"
        return
    from portmoe.planning.fake_world import measure  # takes seconds to import

    traffic = measure(config, layout)
    yield "communication", f"of rank {traffic.rank} in a training step, bytes of the whole buffers:"
    if traffic.messages is None:
        yield "", "not counted: how much goes to which expert depends on the data"
        return
    for kind, group, calls, size in traffic.messages:
        yield "", f"{kind} over {group}: {calls:,} call{'s' if calls > 1 else ''}, {_size(size)}"


def _flops(config: Config) -> Iterator[tuple[str, str]]:
    choices = sorted({experts.gate.top_k for experts in config.architecture.expert_layers})
    plural = "s" if choices != [1] else ""
    experts = f"{' or '.join(map(str, choices)) or 'no'} expert{plural} per token at the real width"
    per_token = (
        ("benchmark", benchmark_flops_per_token(config), "one expert per token, full attention"),
        ("model", model_flops_per_token(config), f"{experts}, full attention"),
        ("model, causal", model_flops_per_token(config, causal=True), f"{experts}, half the attention"),
    )
    for row, (name, flops, counting) in enumerate(per_token):
        yield "" if row else "FLOPs per token", f"{name}: {flops / 1e9:.4g} GFLOP ({counting})"


def _operations(
    config: Config, layout: Layout, accelerator: Accelerator, notes: list[str]
) -> Iterator[tuple[str, str]]:
    """The choice by the backend's order: measuring would allocate buffers of the model's sizes."""
    if config.ops.select == "measure":
        notes.append("note: ops.select is 'measure': training may choose others, by measurement")
    by_order = config.model_copy(update={"ops": config.ops.model_copy(update={"select": "order"})})
    sites = call_sites(config, layout, torch.device(accelerator.device.type))
    table = choose(
        OPERATIONS,
        accelerator.ops.implementations(),
        sites,
        by_order,
        log=lambda line: notes.append(f"note: {line}"),
    )
    for row, choice in enumerate(choice for choice in table.choices if choice.chosen):
        preferred = takewhile(lambda candidate: not candidate.chosen, choice.candidates)
        why_not = "".join(f"; not {c.name}: {c.reason}" for c in preferred)
        where = "" if choice.key == choice.op else f" at {', '.join(choice.sites)}"
        yield "" if row else "operations", f"{choice.op}.{choice.chosen}{where}{why_not}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
