"""What the benchmarks share: opening a device, timing interleaved cases, tables and JSON.

Cases are timed in turn within every round, so that whatever else the machine does falls on all of
them alike, and compared by the median over the rounds of the ratio within a round.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from portmoe import get_accelerator
from portmoe.accelerator import Accelerator

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Bench:
    """An open device and how to time on it."""

    accelerator: Accelerator
    device: torch.device
    clock: Callable[[], float] = time.perf_counter

    def seconds(self, call: Callable[[], Any]) -> float:
        """One call, from an idle device to an idle device."""
        self.accelerator.device.synchronize()
        began = self.clock()
        call()
        self.accelerator.device.synchronize()
        return self.clock() - began

    def fastest(self, call: Callable[[], Any], budget: float = 0.5) -> float:
        """The fastest of as many calls as fit ``budget`` seconds, at least three, after one that warms up."""
        call()
        times = [self.seconds(call) for _ in range(3)]
        while sum(times) < budget:
            times.append(self.seconds(call))
        return min(times)

    def interleaved(
        self, cases: Mapping[str, Callable[[], Any]], rounds: int, renew: Callable[[], None]
    ) -> dict[str, list[float]]:
        """Seconds of every case in every round; ``renew`` comes before each round and is not timed.

        One round more comes first and is not counted. Each round starts with another case.
        """
        times: dict[str, list[float]] = {name: [] for name in cases}
        names = list(cases)
        for number in range(rounds + 1):
            renew()
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                seconds = self.seconds(cases[name])
                if number:
                    times[name].append(seconds)
        return times

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """Memory a call needs at its peak beyond what is held before it.

        On the CPU by the resident set: what the C library keeps for reuse is handed back before, and small
        numbers mean little.
        """
        memory = self.accelerator.memory
        call()
        gc.collect()
        if self.device.type == "cpu" and platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        self.accelerator.device.synchronize()
        memory.reset_peak()
        before = memory.allocated()
        call()
        self.accelerator.device.synchronize()
        return max(0, memory.peak() - before)

    def facts(self) -> dict[str, str]:
        """What a figure must be read with."""
        return {
            "backend": self.accelerator.name,
            "device": self.accelerator.device.name(),
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "python": platform.python_version(),
            "clock": "processor time" if self.clock is time.process_time else "elapsed time",
        }


def options(description: str) -> argparse.ArgumentParser:
    """The options every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", default="auto", help="cpu, …; the best usable one if not given")
    parser.add_argument("--threads", type=int, help="threads on the CPU; torch's own number if not given")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the process's processor time: for one thread on a machine that others use too",
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def open_bench(arguments: argparse.Namespace) -> Bench:
    """The device the options ask for."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    accelerator = get_accelerator(arguments.backend)
    accelerator.memory.keep_freed()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    return Bench(accelerator, accelerator.open(0), clock)


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of the ratio to ``base`` in the same round."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def report(
    bench: Bench, title: str, rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace
) -> None:
    """Print the rows as a table and write them where ``--json`` says."""
    facts = bench.facts()
    print(f"\n{title}\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join((first.strip().ljust(widths[0]), *others)))
    if arguments.json:
        document = {"title": title, "environment": facts, "rows": list(rows)}
        arguments.json.write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
