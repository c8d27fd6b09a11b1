"""One run on one rank, from a config to a finished run directory."""

import time
from signal import Signals

from portmoe.checkpoint.store import complete_steps
from portmoe.config import Config
from portmoe.costs.flops import benchmark_flops_per_token, model_flops_per_token
from portmoe.costs.parameters import count_parameters
from portmoe.costs.step_cost import step_cost
from portmoe.errors import TrainingError
from portmoe.launch.placement import gather_places, placement
from portmoe.model.precision import compute_dtype
from portmoe.parallel.workload import share_of
from portmoe.profiling.profile import FOLDER, StepProfile
from portmoe.profiling.spans import mark_modules
from portmoe.record import provenance
from portmoe.record.report import RunFacts, end_summary, start_block
from portmoe.record.throughput import Throughput
from portmoe.training.session import Session, open_session
from portmoe.training.trainer import Ending, Trainer


def train(
    config: Config, config_name: str, backend: str, launcher: str, profile: bool = False
) -> Signals | None:
    """Train ``config`` as the rank this process is.

    With ``profile`` a few steps are traced; see ``profiling.profile``.

    Returns None when the run is complete, or the signal that asked it to stop, once its state is saved.

    Raises:
        PortmoeError: anything a user, the machine or another rank can cause.
        TrainingError: also where the run has diverged.
    """
    with open_session(config, config_name, backend, launcher, profile) as session:
        machine = session.machine
        places = gather_places(machine.ranks, machine.device, session.world)
        session.writers.note(start_block(_facts(session, placement(places))))
        began = time.perf_counter()
        ending = Trainer(session, _profile(session) if profile else None).fit(throughput_of(session))
        state, reason = _told(ending, config)
        session.run.end(state)
        if machine.ranks.rank == 0:
            session.writers.conclude(
                end_summary(
                    session.run.path,
                    time.perf_counter() - began,
                    dummy_data=config.data.train_folder is None,
                    reason=reason,
                )
            )
    if ending.diverged:
        kept = complete_steps(session.run.checkpoints)
        raise TrainingError(
            f"the run diverged: {ending.diverged}. Lower adam.lr or look at the data of that step; "
            f"{f'the last good checkpoint is that of step {kept[-1]}' if kept else 'there is no checkpoint'}"
        )
    return ending.signal


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
    parameters = count_parameters(config)
    return RunFacts(
        config=session.config_name,
        backend=machine.accelerator.name,
        device=machine.accelerator.device.name(),
        layout=str(machine.layout),
        ranks=ranks,
        parameters=parameters.total,
        active_parameters=parameters.active,
        dtype=config.model.dtype,
        global_batch=machine.layout.global_batch_sequences,
        seq_len=config.data.seq_len,
        first_step=session.progress.step,
        total_steps=config.data.total_steps,
        directory=session.run.path,
        operations={choice.key: choice.chosen for choice in session.ops.choices if choice.chosen},
        variables=provenance.variables(machine.accelerator),
        notes=session.notes,
    )


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
