"""One run on one rank, from a config to a finished run directory."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from portmoe.accelerator import Accelerator, get_accelerator
from portmoe.checkpoint.store import Checkpointer
from portmoe.config import Config
from portmoe.config.read import no_effect_notes
from portmoe.costs.flops import benchmark_flops_per_token, model_flops_per_token
from portmoe.costs.parameters import count_parameters
from portmoe.data import check_data, open_data
from portmoe.errors import TrainingError
from portmoe.launch import launch
from portmoe.launch.interrupt import Interrupt
from portmoe.launch.placement import gather_places, placement
from portmoe.launch.ranks import Ranks, detect
from portmoe.launch.roll_call import RollCall
from portmoe.model.precision import compute_dtype
from portmoe.ops import OpTable
from portmoe.parallel.layout import Layout
from portmoe.parallel.mesh import build_meshes
from portmoe.parallel.stages import describe
from portmoe.parallel.workload import workload_of
from portmoe.planning.memory_check import require_memory
from portmoe.profiling.profile import FOLDER, StepProfile, least_work
from portmoe.profiling.spans import mark_modules, marked_operations
from portmoe.record import provenance
from portmoe.record.report import RunFacts, end_summary, start_block
from portmoe.record.run_directory import RunDirectory
from portmoe.record.throughput import Throughput
from portmoe.record.writers import Writers
from portmoe.training.engine import Engine
from portmoe.training.engines import build_engine
from portmoe.training.operations import choose_operations
from portmoe.training.starting_point import starting_point
from portmoe.training.trainer import Progress, Trainer


@dataclass(frozen=True)
class Session:
    """What is settled before anything is built."""

    config: Config
    config_name: str
    layout: Layout
    accelerator: Accelerator
    device: torch.device
    ranks: Ranks
    run: RunDirectory
    profile: bool


def train(config: Config, config_name: str, backend: str, launcher: str, profile: bool = False) -> None:
    """Train ``config`` as the rank this process is.

    With ``profile`` a few steps are traced; see ``training.profile``.

    Returns when the run is complete, or when a signal asked it to stop and its state is saved.

    Raises:
        PortmoeError: anything a user, the machine or another rank can cause.
    """
    ranks = detect(launcher)
    layout = Layout.plan(config, ranks.world_size)
    check_data(config, layout.data, layout.micro_num)
    accelerator = get_accelerator(backend)
    accelerator.device.set_deterministic(config.cudnn_deterministic)
    accelerator.memory.keep_freed()
    if config.model.dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    with ExitStack() as stack, _explained(ranks) as roll_calls:
        device = launch.start(accelerator, ranks, config.run.collective_timeout)
        stack.callback(launch.stop)
        if ranks.world_size > 1 and launch.PARENT not in os.environ:
            roll_calls.append(RollCall(ranks))
            stack.callback(roll_calls[0].close)
        require_memory(config, layout, accelerator, ranks)
        accelerator.device.seed(config.run.seed)
        run = RunDirectory.open(config, config_name, ranks.rank, _broadcast)
        stack.callback(run.close)
        interrupt = stack.enter_context(Interrupt())
        session = Session(config, config_name, layout, accelerator, device, ranks, run, profile)
        _train_in(session, interrupt, stack)
        for roll_call in roll_calls:
            roll_call.close()
            dist.barrier()  # until all have: rank 0 may hold the store


def _train_in(session: Session, interrupt: Interrupt, stack: ExitStack) -> None:
    """Build, resume, train and report; what must be closed goes on ``stack``."""
    config, layout, device, run = session.config, session.layout, session.device, session.run
    notes = no_effect_notes(config)
    if layout.pipeline > 1:
        notes.append(f"pipeline: {describe(config, layout)}")
    ops = choose_operations(
        config, layout, session.accelerator, device, session.ranks.rank, _broadcast, notes.append
    )
    # Metrics and background writes each get a group of their own, so that their collectives never mix.
    collectives = session.accelerator.collectives
    world, checkpoint_group = collectives.host_group(), collectives.host_group()
    meshes = build_meshes(layout, device.type)
    if session.profile:
        ops = marked_operations(ops)
    pool = session.accelerator.memory.pool
    engine = build_engine(config, layout, ops, meshes, device, world, pool)
    checkpointer = Checkpointer(run.checkpoints, config.ckpt.keep, config.ckpt.async_upload, checkpoint_group)
    stack.callback(checkpointer.close)
    progress = starting_point(run, config, layout, engine, checkpointer, checkpoint_group, notes.append)
    run.write_json("environment.json", provenance.describe(session.accelerator, layout.world))
    run.write_json("ops.json", ops.record())
    writers = Writers(
        run.path,
        config.data.total_steps,
        sys.stdout.isatty(),
        config.monitor.tensorboard.queue_max_length,
        first_step=progress.step,
        enabled=session.ranks.rank == 0,
    )
    stack.callback(writers.close)
    places = gather_places(session.ranks, device, world)
    writers.note(start_block(_facts(session, ops, placement(places), progress, notes)))

    splits = ("train", "valid") if config.data.valid_every else ("train",)
    streams = {
        split: stack.enter_context(
            open_data(
                config, rank=meshes.data_rank, size=layout.data, micro_num=layout.micro_num, split=split
            )
        )
        for split in splits
    }
    trainer = Trainer(
        config,
        layout,
        session.accelerator,
        engine,
        streams["train"],
        streams.get("valid"),
        checkpointer if config.ckpt.enable_save_ckpt else None,
        progress,
        world,
        _profile(session, engine, progress),
    )
    throughput = Throughput(
        layout.world,
        benchmark_flops_per_token(config, recompute=True),
        model_flops_per_token(config),
        session.accelerator.device.peak_flops(compute_dtype(config.model)),
    )
    began = time.perf_counter()
    complete = trainer.fit(writers, throughput, interrupt)
    if complete:
        run.finish()
    if session.ranks.rank == 0:
        writers.conclude(
            end_summary(
                run.path,
                time.perf_counter() - began,
                dummy_data=config.data.train_folder is None,
                reason="finished" if complete else _stopped(config, interrupt),
            )
        )


def _profile(session: Session, engine: Engine, progress: Progress) -> StepProfile | None:
    """Where the run is to be profiled. Marks the model's modules."""
    steps = session.config.data.total_steps - progress.step
    if not session.profile or steps < 1:
        return None
    mark_modules(engine.model)
    workload = workload_of(session.config, session.layout, session.device)
    path = session.run.path / FOLDER / f"trace-rank{session.ranks.rank:05d}.json.gz"
    updated = sum(moment.numel() for moment in engine.optimizer.exp_avg.values())
    least = least_work(engine.model, updated, workload, session.layout.micro_num)
    return StepProfile(path, steps, workload, least)


def _facts(session: Session, ops: OpTable, ranks: str, progress: Progress, notes: list[str]) -> RunFacts:
    config, parameters = session.config, count_parameters(session.config)
    return RunFacts(
        config=session.config_name,
        backend=session.accelerator.name,
        device=session.accelerator.device.name(),
        layout=str(session.layout),
        ranks=ranks,
        parameters=parameters.total,
        active_parameters=parameters.active,
        dtype=config.model.dtype,
        global_batch=session.layout.global_batch_sequences,
        seq_len=config.data.seq_len,
        first_step=progress.step,
        total_steps=config.data.total_steps,
        directory=session.run.path,
        operations={choice.op: choice.chosen for choice in ops.choices},
        variables=provenance.variables(session.accelerator),
        notes=notes,
    )


def _stopped(config: Config, interrupt: Interrupt) -> str:
    """Why the run ended early, and how to go on with it."""
    by = interrupt.received.name if interrupt.received else "a signal to another rank"
    if not config.ckpt.enable_save_ckpt:
        return f"stopped by {by} (nothing saved: ckpt.enable_save_ckpt is false)"
    return f"stopped by {by} (saved: the same command goes on from here)"


def _broadcast(value: Any) -> Any:
    """Rank 0's ``value``, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def _explained(ranks: Ranks) -> Iterator[list[RollCall]]:
    """Turn what the device or another rank can do to this one into an error of ours.

    It yields a list for the roll call, which there is only once the ranks have met.
    """
    roll_calls: list[RollCall] = []
    try:
        yield roll_calls
    except RuntimeError as error:
        # The CPU's allocator raises no class of its own.
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise TrainingError(
                f"rank {ranks.rank} ({ranks.host}) ran out of memory: {_first_line(error)}; lower "
                "data.micro_bsz and raise data.micro_num by the same factor, set model.checkpoint to true, "
                "or use more ranks"
            ) from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise TrainingError(
                f"rank {ranks.rank} ({ranks.host}) lost {_lost(roll_calls)}: {_first_line(error)}; see there "
                "what happened. The run resumes from its newest checkpoint"
            ) from error
        raise


def _lost(roll_calls: Iterable[RollCall]) -> str:
    """Which ranks are gone, where that is known."""
    gone = [rank for roll_call in roll_calls for rank in roll_call.gone()]
    named = ", ".join(map(str, gone[:16])) + (f" and {len(gone) - 16} more" if len(gone) > 16 else "")
    return f"rank{'s' if len(gone) > 1 else ''} {named}" if gone else "another rank"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
