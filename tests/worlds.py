"""Real ranks for the tests: processes that stay, so that torch is imported once and not per layout."""

import contextlib
import gc
import io
import json
import os
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from counted_calls import counted
from free_port import free_port
from zygote import CONTEXT

PATIENCE = 120  # seconds for one call; a hang is a failure


class World:
    """``size`` processes. ``call`` runs a function in each, with a launcher's variables set."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs, rank, size), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Each rank's result of ``function(*args)``. Any failure ends the processes."""
        port = free_port()
        for pipe in self._pipes:
            pipe.send((function, args, port))
        results, failures = [None] * self.size, []
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            # once one rank has failed, the others may wait for it for ever
            answered = wait(waiting, 5 if failures else PATIENCE)
            failures += [f"rank {rank} did not answer" for rank in waiting.values() if not answered]
            for pipe in answered or list(waiting):
                rank = waiting.pop(pipe)
                if answered:
                    ok, results[rank] = self._answer(pipe)
                    failures += [] if ok else [f"rank {rank}:\n{results[rank]}"]
        if failures:
            self.end()
            raise AssertionError("\n".join(failures))
        return results

    @staticmethod
    def _answer(pipe: Connection) -> tuple[bool, Any]:
        try:
            return pipe.recv()
        except (EOFError, ConnectionError):
            return False, "the process has ended"

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, rank: int, size: int) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what is there already needs no looking at
    while True:
        try:
            function, args, port = pipe.recv()
        except EOFError:
            return
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                result = (True, function(*args))
            _drop_process_groups()
        except BaseException:
            result = (False, traceback.format_exc())
        pipe.send(result)


def _drop_process_groups() -> None:
    """End those of the last run, whose threads wake up a hundred times a second as long as they live.

    Cycles of references keep them, and torch's memory of how DTensors were redistributed on their meshes.
    """
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()
    gc.collect()


MODEL = (
    "model.num_attention_heads=4",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.vocab_size=448",
    "model.multiple_of=16",
    "data.seq_len=32",
    "data.micro_bsz=1",
    "data.global_batch_size=8",
    "data.num_samples=400",
    "data.total_steps=10",
    # Ten times 7b_moe4's. With tiny_moe4's, forty times, Adam makes a difference of one rounding grow a
    # hundredfold in 15 steps.
    "adam.lr=1e-3",
    "ckpt.enable_save_ckpt=false",
)


def train(directory: Path, *overrides: str) -> Counter:
    """One rank's part of a run of the small model: the calls of its operations (see ``counted_calls``)."""
    import portmoe
    from portmoe.training.run import train

    config = portmoe.load_config("tiny_moe4", (*MODEL, f"run.directory={directory}", *overrides))
    with counted() as calls:
        train(config, "small", "cpu", "torchrun")
    return calls


def records(directory: Path) -> list[dict[str, Any]]:
    """What a run left in ``metrics.jsonl``, a dict per step."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
