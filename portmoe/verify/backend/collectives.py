"""Collectives between real processes: values, dtypes, uneven splits, groups.

The parent starts one child per rank (``python -m portmoe.verify.backend.collectives NAME RANK RANKS STORE
SECONDS``); each trial's outcome comes back as a record.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from portmoe.accelerator import Accelerator
from portmoe.accelerator.discovery import load
from portmoe.accelerator.probing import describe
from portmoe.result import Result
from portmoe.verify.machine.child import Outcome, report, run_python
from portmoe.verify.machine.trials import COLLECTIVES

MOST_RANKS = 4
ROUNDS = 5


def check_collectives(name: str, accelerator: Accelerator, timeout: float) -> Iterator[Result]:
    """Run every trial on up to four ranks: as many as devices, or four where ranks share one.

    Args:
        name: of the backend, as the children find it.
        timeout: seconds for all of it.
    """
    ranks = MOST_RANKS if accelerator.device.shared else min(MOST_RANKS, accelerator.device.count())
    subject = f"{accelerator.collectives.backend}, {ranks} rank{'s' if ranks > 1 else ''}"
    with tempfile.TemporaryDirectory(prefix="portmoe-") as folder:
        store = str(Path(folder, "store"))
        commands = [
            ["-m", "portmoe.verify.backend.collectives", name, str(rank), str(ranks), store, str(timeout / 2)]
            for rank in range(ranks)
        ]
        outcomes = run_python(commands, {"OMP_NUM_THREADS": "1"}, timeout)
    for trial in TRIALS:
        yield _gathered(subject, trial, outcomes)


def _gathered(subject: str, trial: str, outcomes: list[Outcome]) -> Result:
    """One trial over all ranks: passed where every rank says so."""
    wrong, seconds = [], 0.0
    for rank, outcome in enumerate(outcomes):
        record = next((r for r in outcome.records if r["trial"] == trial), None)
        if record is None:
            wrong.append(f"rank {rank} {outcome.ending or 'said nothing'}: {outcome.last_line}")
        else:
            seconds = max(seconds, record["seconds"])
            wrong += [f"rank {rank}: {record['wrong']}"] if record["wrong"] else []
    status = "fail" if wrong else "pass"
    return Result(status, trial, "; ".join(wrong), part="collectives", subject=subject, seconds=seconds)


def _run(name: str, rank: int, ranks: int, store: str, timeout: timedelta) -> None:
    """The child: open the device, meet, try."""
    accelerator = load(name)
    device = accelerator.open(rank)
    accelerator.collectives.init(device, rank, ranks, timeout, dist.FileStore(store, ranks))
    for trial, attempt in TRIALS.items():
        began = time.perf_counter()
        try:
            wrong = attempt(rank, ranks, device)
        except Exception as error:
            wrong = f"raised {describe(error)}"
        report({"trial": trial, "wrong": wrong, "seconds": time.perf_counter() - began})
    dist.destroy_process_group()


def _differs(got: torch.Tensor, expected: Iterable[float]) -> str:
    got, expected = got.cpu().double().flatten().tolist(), list(expected)
    return "" if got == expected else f"gave {got[:8]} instead of {expected[:8]}"


def _values(rank: int, ranks: int, device: torch.device) -> str:
    """Every collective training uses, several times over: what was left of a former one must not show."""
    for _ in range(ROUNDS):
        for name, trial in COLLECTIVES.items():
            got, expected = trial(rank, ranks, device)
            if wrong := _differs(got, map(float, expected)):
                return f"{name} {wrong}"
    return ""


def _dtypes(rank: int, ranks: int, device: torch.device) -> str:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensor = torch.tensor([rank + 1, 2], device=device, dtype=dtype)
        dist.all_reduce(tensor)
        if wrong := _differs(tensor, [sum(range(1, ranks + 1)), 2.0 * ranks]):
            return f"all_reduce of {dtype} {wrong}"
    largest = torch.tensor([float(rank), -float(rank)], device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return _differs(largest, [ranks - 1.0, 0.0])


def _uneven(rank: int, ranks: int, device: torch.device) -> str:
    """Rank s sends s·d rows to rank d, so rank 0 neither sends nor receives any; then only rank 0 sends."""
    for counts in ([[s * d for d in range(ranks)] for s in range(ranks)], _only_first(ranks)):
        send, receive = counts[rank], [counts[s][rank] for s in range(ranks)]
        rows = torch.tensor([10.0 * rank + d for d in range(ranks) for _ in range(send[d])], device=device)
        out = torch.full((sum(receive), 3), -1.0, device=device)
        dist.all_to_all_single(out, rows.unsqueeze(1).expand(-1, 3).contiguous(), receive, send)
        expected = [10.0 * s + rank for s in range(ranks) for _ in range(receive[s] * 3)]
        if wrong := _differs(out, expected):
            return f"all_to_all of {counts} {wrong}"
    return ""


def _only_first(ranks: int) -> list[list[int]]:
    return [[5] * ranks if s == 0 else [0] * ranks for s in range(ranks)]


def _groups(rank: int, ranks: int, device: torch.device) -> str:
    """Sums within neighbours, then within every other rank: no group may see another's numbers."""
    width = 2 if ranks % 2 == 0 else 1
    neighbours = [list(range(start, start + width)) for start in range(0, ranks, width)]
    strided = [list(range(start, ranks, ranks // width)) for start in range(ranks // width)]
    for groups in (neighbours, strided):
        mine = [dist.new_group(members) for members in groups]
        for members, group in zip(groups, mine, strict=True):
            if rank in members:
                tensor = torch.tensor([2.0**rank], device=device)
                dist.all_reduce(tensor, group=group)
                if wrong := _differs(tensor, [sum(2.0**r for r in members)]):
                    return f"all_reduce within {members} {wrong}"
    return ""


def _average(rank: int, ranks: int, device: torch.device) -> str:
    """A gradient's mean over ranks, as sharded training takes it: scattered sums over the number of ranks."""
    gradient = torch.arange(4.0 * ranks, device=device) * (rank + 1)
    shard = torch.empty(4, device=device)
    dist.reduce_scatter_tensor(shard, gradient)
    mean = sum(range(1, ranks + 1)) / ranks
    expected = [(4 * rank + i) * mean for i in range(4)]
    return _differs(shard / ranks, expected)


def _send_receive(rank: int, ranks: int, device: torch.device) -> str:
    """Each rank hands its number to the next, as a pipeline does."""
    if ranks == 1:
        return ""
    out, mine = torch.empty(3, device=device), torch.full((3,), float(rank), device=device)
    operations = [
        dist.P2POp(dist.isend, mine, (rank + 1) % ranks),
        dist.P2POp(dist.irecv, out, (rank - 1) % ranks),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return _differs(out, [float((rank - 1) % ranks)] * 3)


def _order(rank: int, ranks: int, device: torch.device) -> str:
    """Asynchronous collectives complete with their own numbers."""
    tensors = [torch.full((7,), float(number + rank), device=device) for number in range(8)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in works:
        work.wait()
    for number, tensor in enumerate(tensors):
        if wrong := _differs(tensor, [ranks * number + sum(range(ranks))] * 7):
            return f"the one of {number} {wrong}"
    return ""


TRIALS: dict[str, Callable[[int, int, torch.device], str]] = {
    "values": _values,
    "dtypes and maximum": _dtypes,
    "uneven splits": _uneven,
    "groups": _groups,
    "mean of gradients": _average,
    "send and receive": _send_receive,
    "asynchronous": _order,
}

if __name__ == "__main__":
    backend, its_rank, of_ranks, store_file, seconds = sys.argv[1:]
    _run(backend, int(its_rank), int(of_ranks), store_file, timedelta(seconds=float(seconds)))
