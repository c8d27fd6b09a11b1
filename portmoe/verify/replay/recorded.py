"""What a recorded run offers to a replay: its checkpoints, the steps after them, and its config."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portmoe.checkpoint.folder import STATE_FILE, complete_steps, folder_of
from portmoe.config import Config
from portmoe.config.read import load_config, parse_config
from portmoe.config.sections.data import parse_step_ranges
from portmoe.errors import ConfigError
from portmoe.record.chain import CHAIN, START, read_chain
from portmoe.record.run_directory import CONFIG, checkpoints_of, first_difference
from portmoe.verify.runs.recorded import Run, read_run

# Of the machine and the layout that the run had; a replay elsewhere has its own.
LAYOUT = ("parallel={}", "model.num_chunks=1", "trainer={}")
MACHINE = ("ops={}",)
# A replay saves nothing, validates nothing and starts from nowhere but the checkpoints.
READ_ONLY = ("ckpt={}", "data.valid_every=0", "model.from_pretrained=null")


@dataclass(frozen=True)
class Recorded:
    """A run, and from which of its checkpoints its next step can be computed again.

    Attributes:
        run: as recorded.
        checkpoints: the folder that holds them.
        starts: checkpoint → the step made from it, for those whose step was recorded.
        configs: step → the config of the start that made it. A run that goes on for longer than it was
            first meant to has other learning rates from there on.
    """

    run: Run
    checkpoints: Path
    starts: Mapping[int, int]
    configs: Mapping[int, Config]


def read_recorded(path: Path, overrides: Sequence[str] = (), wanted: str | None = None) -> Recorded:
    """The run in ``path``, wherever it was made.

    Args:
        overrides: of its config, as where ``ckpt.save_ckpt_folder`` is another here.
        wanted: the checkpoints to start from, as "0,50-100"; None: all.

    Raises:
        ConfigError: there is no run, or none of its checkpoints can be replayed.
    """
    run = read_run(path)
    config = load_config(path / CONFIG, overrides)
    if not config.ckpt.save_optimizer:
        raise ConfigError(
            f"the checkpoints of {str(path)!r} hold weights alone (ckpt.save_optimizer=false), and a step "
            "needs the optimizer's moments; train with ckpt.save_optimizer=true"
        )
    checkpoints = path / "checkpoints"
    if not complete_steps(checkpoints):
        checkpoints = checkpoints_of(path, config)
    passed_over = parse_step_ranges(config.data.skip_batches)
    made = {record["step"] for record in run.steps}
    kept = complete_steps(checkpoints)
    starts = {start: step for start in kept if (step := _next_step(start, passed_over)) in made}
    if not starts:
        raise ConfigError(_nothing(path, checkpoints, kept))
    chosen = _chosen(starts, wanted)
    configs = _configs(path)
    return Recorded(
        run, checkpoints, chosen, {step: _config_of(step, configs, run.config) for step in chosen.values()}
    )


def _configs(path: Path) -> list[tuple[int, Config]]:
    """The first step and the config of every start, as the run's chain has them; none without a chain."""
    try:
        entries = [entry.content for entry in read_chain(path) if entry is not None]
        starts = [entry for entry in entries if entry.get("kind") == START]
        return [(start["step"], parse_config(start["config"], CHAIN)) for start in starts]
    except (OSError, KeyError, ConfigError):
        return []


def _config_of(step: int, configs: Sequence[tuple[int, Config]], otherwise: Config) -> Config:
    mine = [config for first_step, config in configs if first_step <= step]
    return mine[-1] if mine else otherwise


def _next_step(step: int, passed_over: Sequence[range]) -> int:
    while any(step in steps for steps in passed_over):
        step += 1
    return step


def _nothing(path: Path, checkpoints: Path, kept: Sequence[int]) -> str:
    fix = "train with ckpt.keep_steps, as in ckpt.keep_steps=[0,10,50], which saves and keeps these states"
    if not kept:
        return f"{str(path)!r} has no checkpoint in {str(checkpoints)!r} to start from; {fix}"
    steps = ", ".join(map(str, kept))
    return f"no step after the checkpoints of {str(path)!r} ({steps}) is in its metrics; {fix}"


def _chosen(starts: Mapping[int, int], wanted: str | None) -> dict[int, int]:
    if wanted is None:
        return dict(starts)
    offered = f"checkpoints that can be replayed: {', '.join(map(str, starts))}"
    try:
        ranges = parse_step_ranges(wanted)
    except ValueError as error:
        raise ConfigError(f"--steps {wanted}: {error}; {offered}") from None
    chosen = {start: step for start, step in starts.items() if any(start in r for r in ranges)}
    singles = [r.start for r in ranges if len(r) == 1 and r.start not in chosen]
    if singles or not chosen:
        missing = ", ".join(map(str, singles)) or wanted
        raise ConfigError(f"--steps {wanted}: there is no checkpoint of step {missing}; {offered}")
    return chosen


def config_of_replay(
    recorded: Recorded, out: Path, backend: str, ranks: int, dtype: str | None, overrides: Sequence[str]
) -> Config:
    """The run's config, on ``ranks`` ranks of ``backend``, for the same global batch of the same data.

    Where ranks or backend are not the run's, its layout or its choice of operations are not taken over.

    Args:
        out: where the replay keeps its own record.
        dtype: to compute in; None: the run's.
        overrides: of layout and operations, as ``load_config`` takes them.

    Raises:
        ConfigError: an override changes the mathematics.
    """
    run = recorded.run
    state = state_of(recorded.checkpoints, min(recorded.starts))
    derived = [f"data.global_batch_size={state['progress']['global_batch']}"]
    if run.config.data.train_folder is None and run.data:
        derived.append(f"data.num_samples={run.data['train']['samples']}")
    derived += LAYOUT if ranks != run.ranks else ()
    derived += MACHINE if backend != run.backend else ()
    derived += [f"model.dtype={dtype}"] if dtype else []
    asked = load_config(run.path / CONFIG, [*derived, *overrides])
    dtype_aside = asked.model_copy(
        update={"model": asked.model.model_copy(update={"dtype": run.config.model.dtype})}
    )
    if difference := first_difference(run.config, dtype_aside, run.data, run.data):
        key, there, here = difference
        raise ConfigError(
            f"--set {key}={here!r}: the run has {key}={there!r}, and a replay computes the same mathematics; "
            "set layout, operations and --dtype only"
        )
    own = [f"run.directory={json.dumps(str(out))}", *READ_ONLY]
    return load_config(run.path / CONFIG, [*derived, *overrides, *own])


def state_of(checkpoints: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds beside tensors.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder_of(checkpoints, step) / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error!r}); replay other checkpoints with --steps"
        ) from error
