"""What one rank of a run holds, opened from the device upwards and closed the other way round."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist

from portmoe.accelerator import Accelerator, get_accelerator
from portmoe.checkpoint.store import Checkpointer
from portmoe.config import Config
from portmoe.config.read import default_model, no_effect_notes
from portmoe.data import DataStream, bad_samples, open_data, open_splits, summary, with_total_steps
from portmoe.data.fingerprint import fingerprint
from portmoe.data.length import rows_passed_over
from portmoe.data.packs import Packs
from portmoe.data.sources.opened import Split
from portmoe.errors import TrainingError
from portmoe.launch import launch
from portmoe.launch.interrupt import Interrupt
from portmoe.launch.ranks import Ranks, detect
from portmoe.launch.roll_call import RollCall
from portmoe.ops import OpTable
from portmoe.parallel.layout import Layout
from portmoe.parallel.mesh import build_meshes
from portmoe.parallel.stages import describe
from portmoe.planning.memory_check import offload_note, require_memory
from portmoe.profiling.spans import marked_operations
from portmoe.record import provenance
from portmoe.record.progress import told_when_due
from portmoe.record.run_directory import ENVIRONMENT, OPERATIONS, Data, RunDirectory
from portmoe.record.writers import Writers
from portmoe.training.answers import Questions
from portmoe.training.engine import Engine
from portmoe.training.engines import build_engine
from portmoe.training.hub import require_folder
from portmoe.training.operations import choose_operations
from portmoe.training.starting_point import Progress, starting_point
from portmoe.training.twin import begin_apart


@dataclass(frozen=True)
class Machine:
    """Where a rank runs and its place among the others.

    Attributes:
        device: this rank's, current in this process.
    """

    accelerator: Accelerator
    ranks: Ranks
    layout: Layout
    device: torch.device


@dataclass(frozen=True)
class Session:
    """One rank's part of a run, ready for its next step.

    Attributes:
        config_name: what the config is called in what the run shows of itself.
        world: a CPU process group of all ranks, for metrics.
        progress: where the run stands; the trainer moves it on.
        valid: None where ``data.valid_every`` is 0.
        questions: None where ``eval.prompts`` is empty, or cannot be asked.
        interrupt: whether this rank was asked to stop.
        notes: what the person at the terminal is to know before the first step.
    """

    config: Config
    config_name: str
    machine: Machine
    data: Data
    run: RunDirectory
    ops: OpTable
    world: dist.ProcessGroup
    engine: Engine
    checkpointer: Checkpointer
    progress: Progress
    writers: Writers
    train: DataStream
    valid: DataStream | None
    questions: Questions | None
    interrupt: Interrupt
    notes: tuple[str, ...]


@contextmanager
def open_session(
    config: Config, config_name: str, backend: str, launcher: str, profile: bool = False
) -> Iterator[Session]:
    """Open the device, meet the other ranks and build what the run needs; closes it all on exit. Collective.

    What the device or another rank does to this one inside the block becomes a ``TrainingError``.

    Args:
        profile: operations are marked for one.

    Raises:
        PortmoeError: the config asks for what these ranks, the device, the data, the run directory or a
            checkpoint cannot give.
    """
    ranks = detect(launcher)
    layout = Layout.plan(config, ranks.world_size)
    with told_when_due("parts", enabled=ranks.rank == 0) as told:
        packs = open_splits(config, layout.data, layout.micro_num, told)
    data = {split: fingerprint(one) for split, one in packs.items()}
    config = with_total_steps(config, layout.data, layout.micro_num, packs["train"])
    accelerator = get_accelerator(backend)
    accelerator.device.set_deterministic(config.cudnn_deterministic)
    accelerator.memory.keep_freed()
    if config.model.dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    with ExitStack() as stack, _explained(ranks) as roll_calls:
        device = launch.start(accelerator, ranks, config.run.collective_timeout)
        stack.callback(launch.stop)
        elsewhere = launch.PARENT not in os.environ or ranks.local_world_size < ranks.world_size
        if ranks.world_size > 1 and elsewhere:  # what started the ranks here sees no others end
            roll_calls.append(RollCall(ranks))
            stack.callback(roll_calls[0].close)
        require_memory(config, layout, accelerator, ranks)
        with ExitStack() as held:
            machine = Machine(accelerator, ranks, layout, device)
            yield _opened(config, config_name, packs, data, machine, profile, held)
        for roll_call in roll_calls:
            roll_call.close()
        # Until all have closed what they write: rank 0 may hold the store, and who started the ranks may
        # end the others when the first one ends with another code than 0.
        dist.barrier()


def _opened(
    config: Config,
    config_name: str,
    packs: dict[Split, Packs],
    data: Data,
    machine: Machine,
    profile: bool,
    stack: ExitStack,
) -> Session:
    """The session on a device that is open; what must be closed goes on ``stack``."""
    accelerator, ranks, layout, device = machine.accelerator, machine.ranks, machine.layout, machine.device
    accelerator.device.seed(config.run.seed)
    run = RunDirectory.open(config, config_name, data, ranks.rank, _broadcast)
    stack.push(run)
    if not run.resuming:
        require_folder(config, ranks.rank, _broadcast)
    interrupt = stack.enter_context(Interrupt())
    notes = [*default_model(config), *no_effect_notes(config), *offload_note(config, accelerator)]
    if run.warning:
        notes.append(f"WARNING: {run.warning}")
    if layout.pipeline > 1:
        notes.append(f"pipeline: {describe(config, layout)}")
    ops = choose_operations(config, layout, accelerator, device, ranks.rank, _broadcast, notes.append)
    if profile:
        ops = marked_operations(ops)
    # Metrics and background writes each get a group of their own, so that their collectives never mix.
    world, writing = accelerator.collectives.host_group(), accelerator.collectives.host_group()
    meshes = build_meshes(layout, device.type)
    engine = build_engine(config, layout, ops, meshes, device, world, accelerator.memory.pool)
    ckpt = config.ckpt
    checkpointer = Checkpointer(run.checkpoints, ckpt.keep, ckpt.async_upload, writing, ckpt.keep_steps)
    stack.callback(checkpointer.close)
    progress = starting_point(run, config, data, layout, engine, checkpointer, writing, notes.append)
    checkpointer.best = progress.best_step
    if config.run.twin and not (run.resuming and progress.step):
        begin_apart(engine, config)
    questions = Questions.of(config, layout, world)
    if config.eval.prompts and questions is None:
        notes.append(
            "eval.prompts are not asked while this run goes on: a pipeline has no pass for it; ask its "
            f"checkpoints or hf_model by `portmoe chat {run.path}`"
        )
    run.write_json(ENVIRONMENT, {**provenance.describe(accelerator, layout.world), "data": data})
    run.write_json(OPERATIONS, ops.record())
    writers = Writers(
        run.path,
        config.data.total_steps,
        config.monitor.tensorboard.queue_max_length,
        first_step=progress.step,
        ranks=layout.world,
        expert_ranks=layout.expert,
        style=config.log.terminal,
        plain_every=config.log.every,
        enabled=ranks.rank == 0,
    )
    checkpointer.on_whole = writers.checkpoint
    stack.callback(writers.close)
    interrupt.told = partial(_tell, config, writers)
    if interrupt.received:  # while all this was opened
        interrupt.told(interrupt.received)
    place = {"rank": meshes.data_rank, "size": layout.data, "micro_num": layout.micro_num}
    streams = {
        split: stack.enter_context(open_data(config, **place, split=split, packs=one))
        for split, one in packs.items()
    }
    notes += bad_samples(config)
    if run.former and progress.step < config.data.total_steps:
        sequences = layout.global_batch_sequences
        if passed := rows_passed_over(run.former, progress.step, packs["train"], sequences):
            notes.append(
                f"the last step of {run.former.data.num_epochs} epochs left room for {passed} rows, which "
                "the next epoch does not take"
            )
    if config.data.packing != "benchmark":
        notes.append(f"data: {summary(config, packs['train'], layout.data, layout.micro_num)}")
    return Session(
        config=config,
        config_name=config_name,
        machine=machine,
        data=data,
        run=run,
        ops=ops,
        world=world,
        engine=engine,
        checkpointer=checkpointer,
        progress=progress,
        writers=writers,
        train=streams["train"],
        valid=streams.get("valid"),
        questions=questions,
        interrupt=interrupt,
        notes=tuple(notes),
    )


def _tell(config: Config, writers: Writers, received: Signals) -> None:
    """Answer a signal at once, from whatever thread it is noticed in."""
    saves = config.ckpt.enable_save_ckpt
    doing = "finishing this step and saving" if saves else "finishing this step; nothing is saved"
    writers.say(f"{received.name}: {doing}{'; Ctrl-C again to abort' * (received is Signals.SIGINT)}")


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
