"""Ranks of the checkpoint tests, run as processes: ``checkpoint_worker.py STORE SCENARIO=FOLDER …``."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from portmoe.accelerator import gloo
from portmoe.checkpoint import storage
from portmoe.checkpoint.folder import complete_steps, folder_of
from portmoe.checkpoint.store import Checkpointer
from portmoe.errors import ConfigError, TrainingError

SHAPES = {"rows": (7, 3), "even": (8, 2), "copied": (5, 4), "plain": (6,), "scalar": (), "half": (3, 5)}


def full(name: str, step: int) -> torch.Tensor:
    """The whole tensor ``name`` as it must be after ``step`` steps."""
    shape = SHAPES[name]
    numel = torch.Size(shape).numel()
    values = torch.arange(numel, dtype=torch.float64).reshape(shape) + 1000 * step + len(name)
    return values.to(torch.bfloat16 if name == "half" else torch.float32)


def laid_out(step: int) -> dict[str, torch.Tensor]:
    """The tensors as this layout holds them: uneven, even and replicated DTensors beside plain ones."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = {"rows": Shard(0), "even": Shard(1), "copied": Replicate(), "half": Shard(0)}
    return {
        name: distribute_tensor(full(name, step), mesh, [placements[name]])
        if name in placements
        else full(name, step)
        for name in SHAPES
    }


def check(tensors: dict[str, torch.Tensor], step: int) -> None:
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, full(name, step)), (name, step)


def save_two(folder: Path, group: dist.ProcessGroup) -> None:
    """Saved while training goes on: what is written is what was, not what became of it."""
    checkpointer = Checkpointer(folder, 2, True, group)
    tensors = laid_out(1)
    for step in (1, 2):
        for name, tensor in tensors.items():
            tensor.copy_(laid_out(step)[name])
        checkpointer.save(step, tensors, {"step": step})
        for tensor in tensors.values():
            tensor.fill_(-1)
    checkpointer.close()


def load_newest(folder: Path, group: dist.ProcessGroup) -> None:
    tensors = laid_out(0)
    step, state = Checkpointer(folder, 2, True, group).resume(tensors, print)
    assert state == {"step": step}
    check(tensors, step)


def save_and_wait(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.save(step, laid_out(step), {"step": step})
    checkpointer.wait()


def fail_on_rank_1(folder: Path, group: dist.ProcessGroup) -> None:
    """One rank's disk is full: every rank hears of it, by name, and the older checkpoint stays."""
    for asynchronous in (True, False):
        checkpointer = Checkpointer(folder, 1, asynchronous, group)
        checkpointer.save(1, laid_out(1), {"step": 1})
        checkpointer.wait()
        written = storage.Writer.write_data

        def full_disk(self, plan, planner):
            raise OSError(28, os.strerror(28))

        if dist.get_rank() == 1:
            storage.Writer.write_data = full_disk
        with pytest.raises(TrainingError, match=r"step 2 .*: rank 1: OSError.* No space left.* there: 1"):
            save_and_wait(checkpointer, 2)
        storage.Writer.write_data = written
        assert checkpointer.latest() == 1
        load_newest(folder, group)
        checkpointer.save(3, laid_out(3), {"step": 3})
        checkpointer.close()
        checkpointer.confirm()
        dist.barrier()
        assert complete_steps(folder) == [3]
        dist.barrier()
        if dist.get_rank() == 0:
            os.rename(folder_of(folder, 3), folder_of(folder, 1))
        dist.barrier()


def mismatch(folder: Path, group: dist.ProcessGroup) -> None:
    """Only rank 1 asks for another shape: both ranks refuse."""
    save_two(folder, group)
    tensors = laid_out(0)
    if dist.get_rank() == 1:
        tensors["plain"] = torch.zeros(7)
    with pytest.raises(ConfigError, match=r"plain is \[6\] there and \[7\] here"):
        Checkpointer(folder, 2, True, group).resume(tensors, print)


def run(scenarios: dict[str, Path], rank: int, world_size: int, store: dist.Store) -> None:
    gloo.use_one_worker()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    group = dist.new_group(backend="gloo")
    for scenario, folder in scenarios.items():
        globals()[scenario](folder, group)
        print("passed", scenario, flush=True)
        dist.barrier()
    dist.destroy_process_group()


def save_for_ever(folder: Path, group: dist.ProcessGroup) -> None:
    """Load and check the newest checkpoint, then save as fast as it goes until killed."""
    big = {f"big{i}": torch.zeros(100_000) for i in range(4)}
    checkpointer = Checkpointer(folder, 2, True, group)
    found = checkpointer.resume(big, print)
    step = 0
    if found:
        step, state = found
        assert state == {"step": step, "text": "x" * step}
        assert all(torch.all(tensor == step + int(name[3:])) for name, tensor in big.items())
    print(f"resumed {step}", flush=True)
    while True:
        step += 1
        for name, tensor in big.items():
            tensor.fill_(step + int(name[3:]))
        checkpointer.save(step, big, {"step": step, "text": "x" * step})


def kill_and_resume(folder: Path, kills: int) -> None:
    """Fork a saver, kill it at a random moment, and again; forked, because importing torch takes seconds."""
    draw = random.Random(5)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                run({"save_for_ever": folder}, 0, 1, dist.HashStore())
            finally:
                os._exit(1)  # reached only by an error, whose traceback has been printed
        time.sleep(draw.uniform(0.15, 0.5))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the saver failed: {status}"
        states = sorted(entry.suffix or "whole" for entry in folder.glob("step-*"))
        print("left", *states, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "kill_and_resume":
        kill_and_resume(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        _, place_of_store, *pairs = sys.argv
        size = int(os.environ["WORLD_SIZE"])
        chosen = {name: Path(place) for name, place in (pair.split("=") for pair in pairs)}
        run(chosen, int(os.environ["RANK"]), size, dist.FileStore(place_of_store, size))
