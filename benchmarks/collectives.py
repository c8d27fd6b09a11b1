"""The collectives a training step uses, by size, between processes of one machine.

GB/s is the size of the result (for reduce-scatter: of the input) on one rank over the time of the slowest.

  python benchmarks/collectives.py --nproc 4
"""

import argparse
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import Bench, open_bench, options, report


def calls(size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each on ``size`` bytes of float32."""
    world = dist.get_world_size()
    numel = max(world, size // 4 // world * world)
    whole, part = torch.ones(numel, device=device), torch.ones(numel // world, device=device)
    other = torch.empty_like(whole)
    return {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all-to-all": lambda: dist.all_to_all_single(other, whole),
    }


def work(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    bench = open_bench(arguments)
    device = bench.accelerator.open(rank)
    bench = Bench(bench.accelerator, device)
    store = dist.FileStore(f"{folder}/store", arguments.nproc)
    bench.accelerator.collectives.init(device, rank, arguments.nproc, timedelta(minutes=2), store)
    rows = []
    for kibibytes in arguments.kib:
        for name, call in calls(kibibytes * 1024, device).items():
            seconds = torch.tensor([_fastest(bench, call)], dtype=torch.float64)
            slowest = [torch.empty_like(seconds) for _ in range(arguments.nproc)]
            dist.all_gather_object(slowest, seconds.item())
            rows.append(
                {
                    "collective": name,
                    "KiB": kibibytes,
                    "ms": max(slowest) * 1e3,
                    "GB/s": kibibytes * 1024 / max(slowest) / 1e9,
                }
            )
    if rank == 0:
        report(bench, f"Collectives between {arguments.nproc} processes", rows, arguments)
    dist.destroy_process_group()


def _fastest(bench: Bench, call: Callable[[], object]) -> float:
    """Of five calls that all ranks begin together."""
    times = []
    for _ in range(6):
        dist.barrier()
        times.append(bench.seconds(call))
    return min(times[1:])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--kib", type=int, nargs="+", default=[64, 1024, 16384], help="sizes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (arguments, str(Path(folder))), nprocs=arguments.nproc)


if __name__ == "__main__":
    main()
