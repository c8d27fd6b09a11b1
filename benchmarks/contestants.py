"""Who trains in benchmarks/finetune.py: portmoe and transformers, each in processes of its own.

A contestant loads the same folder of weights, takes the same pack of samples, and makes whole steps when it
is asked to: forward, backward, clipping, AdamW. It answers with the seconds, the loss and its peak memory.
"""

import ctypes
import gc
import multiprocessing
import platform
import resource
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

IGNORED = -100
CLIP, BETAS, EPSILON, RATE = 1.0, (0.9, 0.999), 1e-8, 1e-5  # of AdamW and the clipping, in both
OUT_OF_MEMORY = "out of memory"
WARM_UP = 64  # tokens
PATIENCE = 10  # seconds for a process to end by itself


@dataclass(frozen=True)
class Pack:
    """Samples one after the other.

    Attributes:
        ends: of each sample; the first begins at 0.
        learned_T: which tokens a model is trained to say.
    """

    tokens_T: torch.Tensor
    learned_T: torch.Tensor
    ends: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        return (0, *self.ends)

    def positions_T(self) -> torch.Tensor:
        """From 0 in each sample."""
        return torch.cat([torch.arange(end - start) for start, end in pairwise(self.offsets)])

    def labels_T(self) -> torch.Tensor:
        """The tokens to be said, each at its own place; a sample's first one is said by none."""
        labels_T = torch.where(self.learned_T, self.tokens_T, IGNORED)
        labels_T[list(self.offsets[:-1])] = IGNORED
        return labels_T


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        name: as the table has it.
        ours: portmoe; else transformers, by ``experts`` and ``attention``.
        one_by_one: a pass for each sample; else the pack is one row.
        recompute: gradient checkpointing.
        ranks: that share a pack's tokens.
    """

    name: str
    ours: bool
    experts: str = "grouped_mm"
    attention: str = "sdpa"
    one_by_one: bool = False
    recompute: bool = False
    ranks: int = 1


@dataclass(frozen=True)
class Task:
    """What all contestants are given.

    Attributes:
        folder: of the weights, in the hub's format.
        varlen: attention stays within samples; else it sees all of the pack before.
        processor_time: count the process's, not what elapses.
        memory_limit: bytes a process on the CPU may have.
    """

    config: str
    overrides: tuple[str, ...]
    folder: Path
    pack: Pack
    varlen: bool
    dtype: str
    backend: str
    threads: int
    processor_time: bool
    memory_limit: int

    def beginning(self, tokens: int) -> "Task":
        """The same with only that many tokens."""
        pack = self.pack
        ends = (*(end for end in pack.ends if end < tokens), tokens)
        return replace(self, pack=Pack(pack.tokens_T[:tokens], pack.learned_T[:tokens], ends))


@dataclass(frozen=True)
class Step:
    """What a contestant says of one step; ``failure`` instead of figures where it could not."""

    seconds: float = 0.0
    loss: float = 0.0
    peak_bytes: int = 0
    failure: str | None = None


class Contestant:
    """The processes of one way, which have made a first step; closed, they are gone with their memory.

    Attributes:
        first: that step.
    """

    def __init__(self, task: Task, way: Way, scratch: Path) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp(dir=scratch)) / "store"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(way.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, task, way, rank, store), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._failure: str | None = None
        self.first = self.step()

    def step(self) -> Step:
        """One step of all ranks: the time and the memory of the rank that has the most of it."""
        if self._failure is None:
            steps = self._steps()
            self._failure = next((step.failure for step in steps if step.failure), None)
        if self._failure is not None:
            return Step(failure=self._failure)
        seconds, peak = (max(getattr(step, name) for step in steps) for name in ("seconds", "peak_bytes"))
        return Step(seconds, steps[0].loss, peak)

    def _steps(self) -> list[Step]:
        """Every rank's, or those before one that failed: the others then wait for it."""
        steps: list[Step] = []
        waiting = list(self._pipes)
        try:
            for pipe in waiting:
                pipe.send(None)
            while waiting and not (steps and steps[-1].failure):
                pipe = wait(waiting)[0]
                waiting.remove(pipe)
                steps.append(pipe.recv())
        except (EOFError, ConnectionError):
            steps.append(Step(failure="the process has ended"))
        return steps

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(PATIENCE)
            process.kill()


def _serve(pipe: Connection, task: Task, way: Way, rank: int, store: Path) -> None:
    """One rank: a ``Step`` for every message, until one fails."""
    from portmoe import get_accelerator

    torch.set_num_threads(task.threads)
    accelerator = get_accelerator(task.backend)
    accelerator.memory.keep_freed()  # as portmoe trains, and theirs too
    device = accelerator.open(0 if accelerator.device.shared else rank)
    synchronize = accelerator.device.synchronize
    clock = time.process_time if task.processor_time else time.perf_counter
    try:
        if way.ours:
            met = dist.HashStore() if way.ranks == 1 else dist.FileStore(str(store), way.ranks)
            accelerator.collectives.init(device, rank, way.ranks, timedelta(minutes=10), met)
        kind = Ours if way.ours else Theirs
        kind(task.beginning(WARM_UP), way, device).step()  # what a first step loads is no contestant's
        _hand_back_freed(device)
        accelerator.memory.reset_peak()
        before = accelerator.memory.allocated()
        if device.type == "cpu":
            resource.setrlimit(resource.RLIMIT_DATA, (before + task.memory_limit,) * 2)
        side = kind(task, way, device)
        while True:
            pipe.recv()
            synchronize()
            began = clock()
            loss = side.step()
            synchronize()
            pipe.send(Step(clock() - began, loss, accelerator.memory.peak() - before))
    except EOFError:  # the table is done
        return
    except Exception as error:
        pipe.send(Step(failure=_said(error)))
        with suppress(EOFError):  # an answer is only had from a process that is there
            while True:
                pipe.recv()


def _hand_back_freed(device: torch.device) -> None:
    gc.collect()
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    elif device.type != "cpu":
        torch.accelerator.empty_cache()


def _said(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    # The CPU's allocator and product library raise no class of their own.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "alloc" in first or "memory" in first:
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {first}"


class Ours:
    """The native engine as ``portmoe train`` runs it, from the folder's weights."""

    def __init__(self, task: Task, way: Way, device: torch.device) -> None:
        from portmoe import load_config
        from portmoe.data.batch import Batch
        from portmoe.ops import Segments
        from portmoe.training.hub import Weights

        config = load_config(task.config, ours_overrides(task, way))
        self._engine, self._layout, world = engine_of(config, task.backend, device, way.ranks)
        Weights.of(config).load(self._engine, world)
        pack = task.pack
        positions_T, segments = pack.positions_T(), Segments(pack.offsets)
        if not task.varlen:
            positions_T, segments = torch.arange(len(positions_T)), Segments((0, len(positions_T)))
        labels_T = pack.labels_T().roll(-1)  # ours are what comes next
        labels_T[-1] = IGNORED
        types_T = torch.zeros_like(pack.tokens_T)
        self._batch = Batch(pack.tokens_T, labels_T, positions_T, types_T, segments, index=0)
        self._steps = 0

    def step(self) -> float:
        outcome = self._engine.train_step(self._steps, [self._batch])
        self._steps += 1
        return outcome.metrics.reduce(False, dist.group.WORLD, self._layout).loss


def ours_overrides(task: Task, way: Way) -> list[str]:
    """The settings that make our run the same as theirs."""
    return [
        *task.overrides,
        f"model.from_pretrained={task.folder}",
        f"model.dtype={task.dtype}",
        f"model.checkpoint={str(way.recompute).lower()}",
        f"data.seq_len={len(task.pack.tokens_T)}",
        *("data.micro_bsz=1", "data.micro_num=1", "data.global_batch_size=null", "data.train_folder=null"),
        "data.fixed_random_dataset_seqlen=false",
        *(f"adam.adam_beta{number}={beta}" for number, beta in enumerate(BETAS, 1)),
        *(f"adam.adam_eps={EPSILON}", "adam.weight_decay=0", f"hybrid_zero_optimizer.clip_grad_norm={CLIP}"),
        *(f"adam.lr={RATE}", f"lr_scheduler.eta_min={RATE}", "lr_scheduler.warmup_ratio=0"),
        *((f"parallel.sequence.size={way.ranks}",) if way.ranks > 1 else ()),
    ]


class Theirs:
    """transformers' model in the trained type, with torch's fused AdamW."""

    def __init__(self, task: Task, way: Way, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(
            task.folder,
            dtype=getattr(torch, task.dtype),
            attn_implementation=way.attention,
            experts_implementation=way.experts,
        )
        self._model.to(device).train()
        if way.recompute:
            self._model.activation_checkpointing_enable()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True
        )
        pack = task.pack
        tensors = [pack.tokens_T, pack.labels_T(), pack.positions_T()]
        lengths = [end - start for start, end in pairwise(pack.offsets)]
        pieces = zip(*(t.split(lengths) for t in tensors), strict=True) if way.one_by_one else [tensors]
        self._rows = [[t.unsqueeze(0).to(device) for t in piece] for piece in pieces]
        self._varlen = task.varlen and not way.one_by_one
        self._labels = int((pack.labels_T() != IGNORED).sum())

    def step(self) -> float:
        total = 0.0
        for tokens_1T, labels_1T, positions_1T in self._rows:
            positions = {"position_ids": positions_1T} if self._varlen else {}
            loss = self._model(
                input_ids=tokens_1T,
                labels=labels_1T,
                num_items_in_batch=self._labels,
                use_cache=False,
                **positions,
            ).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(total)


def engine_of(config: Any, backend: str, device: torch.device, ranks: int) -> tuple[Any, Any, Any]:
    """The engine on the ranks of the default process group, its layout, and a group for metrics."""
    from portmoe import get_accelerator
    from portmoe.ops import OPERATIONS, choose
    from portmoe.parallel.layout import Layout
    from portmoe.parallel.mesh import build_meshes
    from portmoe.parallel.workload import call_sites
    from portmoe.training.engine import NativeEngine

    layout, world = Layout.plan(config, ranks), dist.new_group(backend="gloo")
    offered = get_accelerator(backend).ops.implementations()
    ops = choose(OPERATIONS, offered, call_sites(config, layout, device), config)
    meshes = build_meshes(layout, device.type)
    return NativeEngine(config, layout, ops, meshes, device, world), layout, world


def write_folder(config_name: str, overrides: tuple[str, ...], folder: Path) -> None:
    """A model's first weights in float32, in the hub's format. Needs a process group of one."""
    from portmoe import load_config
    from portmoe.training.hub import export

    config = load_config(config_name, [*overrides, "ckpt.export_dtype=float32"])
    engine, _, world = engine_of(config, "cpu", torch.device("cpu"), 1)
    export(config, folder.parent, folder, engine, world)


def write_folder_alone(*arguments: Any) -> None:
    """``write_folder`` in a process of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    write_folder(*arguments)
    dist.destroy_process_group()
