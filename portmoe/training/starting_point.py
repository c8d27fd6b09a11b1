"""Where a run begins: at its own newest checkpoint, at weights the config names, or anew."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from portmoe.checkpoint.store import Checkpointer, read
from portmoe.config import Config
from portmoe.errors import ConfigError
from portmoe.parallel.layout import Layout
from portmoe.record.run_directory import RunDirectory
from portmoe.training.engine import Engine


@dataclass
class Progress:
    """Where a run is: what a checkpoint keeps beside the engine's own state."""

    step: int = 0  # completed steps, passed-over ones included
    consumed_tokens: int = 0
    global_batch: int = 0  # sequences per step: what places a step in the data


def starting_point(
    run: RunDirectory,
    config: Config,
    layout: Layout,
    engine: Engine,
    checkpointer: Checkpointer,
    group: dist.ProcessGroup,
    log: Callable[[str], None],
) -> Progress:
    """Put the engine into the state the run begins in. Collective.

    Args:
        group: a CPU group of all ranks, to read with.
        log: receives a line about anything but a plain start.

    Raises:
        ConfigError: the checkpoint is of another model.
        TrainingError: no checkpoint there can be read.
    """
    if run.resuming:
        tensors = engine.tensors()
        found = checkpointer.resume(tensors, log)
        for problem in checkpointer.problems():
            log(f"WARNING: {problem}")
        if found is not None:
            _, state = found
            engine.take(tensors)
            engine.load_state(state["engine"])
            return _continued(state["progress"], layout)
    source = config.ckpt.load_ckpt_info
    if source is None or source.path is None:
        return Progress(global_batch=layout.global_batch_sequences)
    log(f"starting from {', '.join(source.content)} of {source.path}")
    return _from_other_run(Path(source.path), source.content, layout, engine, group)


def _from_other_run(
    checkpoint: Path,
    content: Collection[str],
    layout: Layout,
    engine: Engine,
    group: dist.ProcessGroup,
) -> Progress:
    """Take the parts named by ``ckpt.load_ckpt_info.content``.

    Schedules and sampler are functions of the step, so either name takes over the step.
    """
    everything = "all" in content
    kinds = tuple(f"{kind}." for kind in ("model", "optimizer") if everything or kind in content)
    tensors = {name: tensor for name, tensor in engine.tensors().items() if name.startswith(kinds)}
    state = read(checkpoint, tensors, group, subset=True)
    engine.take(tensors)
    if everything or "optimizer" in content:
        engine.load_state(state["engine"])
    if everything or {"sampler", "scheduler"} & set(content):
        return _continued(state["progress"], layout)
    return Progress(global_batch=layout.global_batch_sequences)


def _continued(saved: Mapping[str, int], layout: Layout) -> Progress:
    """The progress saved, where a step still means the same place in the data."""
    progress, here = Progress(**saved), layout.global_batch_sequences
    if progress.global_batch != here:
        raise ConfigError(
            f"the checkpoint was made with a global batch of {progress.global_batch} sequences, and this run "
            f"has {here} = data.micro_bsz · micro_num · data-parallel size; set data.global_batch_size to "
            f"{progress.global_batch}, or choose another run.directory"
        )
    return progress
