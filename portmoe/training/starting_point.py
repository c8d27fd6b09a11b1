"""Where a run begins: at its own newest checkpoint, at weights the config names, or anew."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from portmoe.checkpoint.agreement import on_first_rank
from portmoe.checkpoint.store import Checkpointer, folder_of, read
from portmoe.config import Config
from portmoe.data.fingerprint import described
from portmoe.errors import ConfigError
from portmoe.parallel.layout import Layout
from portmoe.record.run_directory import Data, RunDirectory, changed_data
from portmoe.training.beside import keep
from portmoe.training.engine import Engine
from portmoe.training.hub import begin_at_folder
from portmoe.training.schedule import learning_rate


@dataclass
class Progress:
    """Where a run is: what a checkpoint keeps beside the engine's own state."""

    step: int = 0  # completed steps, passed-over ones included
    consumed_tokens: int = 0
    global_batch: int = 0  # sequences per step: what places a step in the data
    best_step: int | None = None  # with ckpt.keep_best: completed steps of the checkpoint of the lowest
    best_loss: float | None = None  # validation loss, and that loss


def starting_point(
    run: RunDirectory,
    config: Config,
    data: Data,
    layout: Layout,
    engine: Engine,
    checkpointer: Checkpointer,
    group: dist.ProcessGroup,
    log: Callable[[str], None],
) -> Progress:
    """Put the engine into the state the run begins in. Collective.

    Args:
        data: what the run trains on, see ``data.fingerprint``.
        group: a CPU group of all ranks, to read with.
        log: receives a line about anything but a plain start.

    Raises:
        ConfigError: the checkpoint is of another model, or the folder of ``model.from_pretrained`` is broken.
        TrainingError: no checkpoint there can be read.
    """
    if run.resuming:
        tensors = engine.tensors()
        found = checkpointer.resume(tensors, log)
        for problem in checkpointer.problems():
            log(f"WARNING: {problem}")
        if found is not None:
            step, state = found
            here = _Here(config, data["train"], layout, log)
            progress = here.continued(folder_of(checkpointer.folder, step), state)
            engine.take(tensors)
            engine.load_state(state["engine"])
            if run.former:
                _tell_other_rates(run.former, config, progress.step, log)
            return progress
    if config.model.from_pretrained is not None:
        log(f"starting from the weights of {config.model.from_pretrained}")
        begin_at_folder(config, run.path, engine, group)
    else:
        on_first_rank(group, lambda: keep(config, run.path, None))
    source = config.ckpt.load_ckpt_info
    if source is None or source.path is None:
        return Progress(global_batch=layout.global_batch_sequences)
    log(f"starting from {', '.join(source.content)} of {source.path}")
    here = _Here(config, data["train"], layout, log)
    return _from_other_run(Path(source.path), source.content, here, engine, group)


def _from_other_run(
    checkpoint: Path,
    content: Collection[str],
    here: "_Here",
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
        return replace(here.continued(checkpoint, state), best_step=None, best_loss=None)  # of that run
    return Progress(global_batch=here.layout.global_batch_sequences)


@dataclass(frozen=True)
class _Here:
    """What a step's place in the data depends on."""

    config: Config
    data: Mapping[str, Any]
    layout: Layout
    log: Callable[[str], None]

    def continued(self, checkpoint: Path, state: Mapping[str, Any]) -> Progress:
        """The progress saved, where a step still means the same place in the same data."""
        progress, here = Progress(**state["progress"]), self.layout.global_batch_sequences
        if progress.global_batch != here:
            raise ConfigError(
                f"the checkpoint was made with a global batch of {progress.global_batch} sequences, and this "
                f"run has {here} = data.micro_bsz · micro_num · data-parallel size; set "
                f"data.global_batch_size to {progress.global_batch}, or choose another run.directory"
            )
        former = state.get("data")  # older checkpoints do not say
        if former and former != self.data:
            if not self.config.ckpt.allow_changed_data:
                raise changed_data(str(checkpoint), former, self.data)
            self.log(
                f"the data changed at step {progress.step}: {described(former)} before, "
                f"{described(self.data)} from there on (ckpt.allow_changed_data)"
            )
        return progress


def _tell_other_rates(former: Config, config: Config, step: int, log: Callable[[str], None]) -> None:
    """A schedule that is another from here on is allowed, and said: the rate may jump."""
    before, now = learning_rate(former, step), learning_rate(config, step)
    if before != now:
        total = former.lr_scheduler.total_steps or former.data.total_steps
        log(
            f"the learning rate of step {step} is {now:.4g}, and was to be {before:.4g}: its schedule has "
            f"{config.lr_scheduler.total_steps or config.data.total_steps} steps; set "
            f"lr_scheduler.total_steps to {total} to keep the former one"
        )
