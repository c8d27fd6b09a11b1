"""One run on one rank, from a config to a finished run directory."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from portmoe.accelerator.discovery import AUTO
from portmoe.checkpoint.store import complete_steps
from portmoe.config import Config
from portmoe.config.checks import of_the_data
from portmoe.config.read import config_name as name_of
from portmoe.config.read import load_config
from portmoe.costs.flops import benchmark_flops_per_token, model_flops_per_token
from portmoe.costs.parameters import count_parameters
from portmoe.costs.step_cost import step_cost
from portmoe.data.text.tokenizer import BYTES
from portmoe.errors import ConfigError, TrainingError
from portmoe.families.registry import families
from portmoe.launch.placement import gather_places, placement
from portmoe.model.precision import compute_dtype
from portmoe.parallel.workload import share_of
from portmoe.profiling.profile import FOLDER, StepProfile
from portmoe.profiling.spans import mark_modules
from portmoe.record import provenance
from portmoe.record.acceptance import applies, of_the_benchmark, out_of_reach
from portmoe.record.origin import command
from portmoe.record.report import RunFacts, end_summary, start_block, start_lines
from portmoe.record.results import read_metrics
from portmoe.record.terminal import terminal
from portmoe.record.throughput import Throughput
from portmoe.training.session import Session, open_session
from portmoe.training.trainer import Ending, Trainer


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        directory: of the run.
        signal: what asked it to stop before its last step; None: it is complete.
        accepted: whether the benchmark accepts it; None: its acceptance does not apply, or the run was too
            short for it. Known on rank 0.
    """

    directory: Path
    signal: Signals | None
    accepted: bool | None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The record of every step so far, those of former starts included, see ``read_metrics``."""
        return read_metrics(self.directory)


def train(
    config: Config | str | Path,
    config_name: str | None = None,
    backend: str = AUTO,
    launcher: str = "auto",
    profile: bool = False,
) -> Outcome:
    """Train ``config`` as the rank this process is; collective over all ranks.

    Args:
        config: or the path of a file, or a packaged name.
        config_name: what the run directory is called without ``run.directory`` and ``run.name``; by default
            the name of the file, else "run".
        backend: the accelerator; "auto": the best that can be used here.
        launcher: who started the ranks, see ``launch.ranks.detect``.
        profile: trace a few steps, see ``profiling.profile``.

    Returns once the run is complete, or stopped by a signal and saved.

    Raises:
        PortmoeError: anything a user, the machine or another rank can cause.
        TrainingError: also where the run has diverged.
        KeyboardInterrupt: a second Ctrl-C.
    """
    if not isinstance(config, Config):
        config, config_name = load_config(config), config_name or name_of(config)
    if problems := list(of_the_data(config)):
        raise ConfigError(problems[0])
    session = None
    try:
        with open_session(config, config_name or "run", backend, launcher, profile) as session:
            ending, accepted = _trained(session, profile)
    except KeyboardInterrupt:
        if session and session.machine.ranks.rank == 0:
            terminal().print(_aborted(session))
        raise
    if ending.diverged:
        kept = complete_steps(session.run.checkpoints)
        raise TrainingError(
            f"the run diverged: {ending.diverged}. Lower adam.lr or look at the data of that step; "
            f"{f'the last good checkpoint is that of step {kept[-1]}' if kept else 'there is no checkpoint'}"
        )
    return Outcome(session.run.path, ending.signal, accepted)


def _trained(session: Session, profile: bool) -> tuple[Ending, bool | None]:
    """Make the steps; how they ended and, on rank 0, whether the benchmark accepts the run."""
    config, machine = session.config, session.machine
    places = gather_places(machine.ranks, machine.device, session.world)
    facts = _facts(session, placement(places))
    session.writers.begin(start_block(facts), start_lines(facts))
    began = time.perf_counter()
    ending = Trainer(session, _profile(session) if profile else None).fit(throughput_of(session))
    state, reason = _told(ending, config)
    session.run.end(state)
    if machine.ranks.rank:
        return ending, None
    seconds = time.perf_counter() - began
    typed = command()
    goes_on = state == "stopped" and config.ckpt.enable_save_ckpt and "portmoe train" in typed
    summary = end_summary(
        session.run.path,
        seconds,
        applies(config),
        reason,
        machine.layout.world,
        again=typed if goes_on else None,
        follows=what_follows(config, session.run.path) if state == "finished" else (),
    )
    session.writers.conclude(summary.text)
    return ending, summary.verdict and summary.verdict.accepted


def what_follows(config: Config, run: Path) -> tuple[str, ...]:
    """What a finished run is for: figures to file, or a model to talk to and to take elsewhere."""
    path = shlex.quote(str(run))
    if config.ckpt.enable_save_ckpt and families()[config.model_type].hub:
        tokenizer = config.data.tokenizer or config.model.from_pretrained
        talk = (f"portmoe chat {path}",) if tokenizer and str(tokenizer) != BYTES else ()
        return (*talk, f"portmoe export {path} --out FOLDER")
    return (f"portmoe report {path}",) if of_the_benchmark(config) else ()


def _aborted(session: Session) -> str:
    """What is left of a run that was not let finish its step."""
    kept = complete_steps(session.run.checkpoints)
    if not kept:
        return f"aborted: nothing was saved; run directory {session.run.path}"
    where = session.run.checkpoints
    return f"aborted: the same command goes on from the checkpoint of step {kept[-1]} in {where}"


def throughput_of(session: Session) -> Throughput:
    """A fresh count of this run's speed."""
    config, machine = session.config, session.machine
    return Throughput(
        machine.layout.world,
        benchmark_flops_per_token(config, recompute=True),
        model_flops_per_token(config),
        machine.accelerator.device.peak_flops(compute_dtype(config.model)),
    )


def _profile(session: Session) -> StepProfile | None:
    """The profile of the steps to come; None where there are none. Marks the model's modules."""
    steps = session.config.data.total_steps - session.progress.step
    if steps < 1:
        return None
    engine, layout = session.engine, session.machine.layout
    mark_modules(engine.model)
    share = share_of(session.config, layout, session.machine.device)
    path = session.run.path / FOLDER / f"trace-rank{session.machine.ranks.rank:05d}.json.gz"
    updated = sum(moment.numel() for moment in engine.optimizer.exp_avg.values())
    least = step_cost(engine.model, share, micro_batches=layout.micro_num, parameters=updated)
    device, linear = session.machine.accelerator.device, session.ops.linear
    return StepProfile(path, steps, share, least, device, linear)


def _facts(session: Session, ranks: str) -> RunFacts:
    config, machine = session.config, session.machine
    parameters, model = count_parameters(config), config.architecture
    networks = sorted({f"{layer.count} experts top {layer.gate.top_k}" for layer in model.expert_layers})
    plural = "s" * (len(model.layers) > 1)
    return RunFacts(
        config=session.config_name,
        model=f"{len(model.layers)} layer{plural} of {model.hidden}, {' or '.join(networks) or 'dense'}",
        backend=machine.accelerator.name,
        device=machine.accelerator.device.name(),
        layout=str(machine.layout),
        ranks=ranks,
        number_of_ranks=machine.layout.world,
        parameters=parameters.total,
        active_parameters=parameters.active,
        dtype=config.model.dtype,
        global_batch=machine.layout.global_batch_sequences,
        seq_len=config.data.seq_len,
        first_step=session.progress.step,
        total_steps=config.data.total_steps,
        directory=session.run.path,
        origin=_origin(session),
        operations={choice.key: choice.chosen for choice in session.ops.choices if choice.chosen},
        variables=provenance.variables(machine.accelerator),
        notes=(*session.notes, *filter(None, [out_of_reach(config)])),
    )


def _origin(session: Session) -> str:
    """Why the run lives where it does, and where it begins."""
    done = session.progress.step
    if not (done and session.run.resuming):
        return session.run.origin
    if done >= session.config.data.total_steps:
        return f"finished: nothing is left to do (data.total_steps is {session.config.data.total_steps})"
    return f"continued at step {done}"


def _told(ending: Ending, config: Config) -> tuple[str, str]:
    """The state a run ends in, and in words why, and how to go on with it."""
    if ending.diverged:
        return "diverged", "diverged"
    if ending.signal is None:
        return "finished", "finished"
    saved = (
        "saved: the same command goes on from here"
        if config.ckpt.enable_save_ckpt
        else "nothing saved: ckpt.enable_save_ckpt is false"
    )
    return "stopped", f"stopped by {ending.signal.name} ({saved})"
