"""Full fine-tuning beside transformers: 8k and 16k tokens, attention within samples or over the pack, tokens
split over 1, 2 and 4 ranks.

Both load the same folder of weights and take the same pack of samples, in the same type, with as many threads
a rank, and make whole steps: forward, backward, clipping, AdamW. Each runs in processes of its own, so that
peak memory is its own (beyond what its process held before the weights); steps are made in turn within every
round. The first losses are held beside each other: they are the same model. transformers first tries its ways
(how experts and attention are computed; the pack as one row with positions that restart, or a forward and
backward pass for each sample) and enters with the quickest. What runs out of memory is tried again with
gradient checkpointing.

  python benchmarks/finetune.py --threads 1 --tokens 8192 --sequence-parallel 1
  python benchmarks/finetune.py --shapes lite --backend cuda      (untested: no GPU was at hand)
"""

import argparse
import importlib.util
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from contestants import OUT_OF_MEMORY, Contestant, Pack, Step, Task, Way, write_folder_alone
from measuring import open_bench, options, ratio, report

from portmoe import load_config
from portmoe.accelerator.host_memory import host_memory
from portmoe.backends.cpu.products import slow_in

# The auxiliary losses are off: one of the two libraries has none for one of the families.
SHAPES = {
    "tiny": {
        "tiny_deepseek_v2": ("model.aux_loss_alpha=0",),
        "tiny_mixtral": ("model.router_aux_loss_coef=0",),
    },
    "lite": {"deepseek_v2_lite": ("model.aux_loss_alpha=0", "model.num_hidden_layers=3")},
}
LONGEST = 2048  # tokens of a sample
SPREAD = 0.9  # of the logarithm of a sample's length
PROMPT = 0.4  # of a sample is not learned
# transformers splits a sequence over ranks through accelerate's context parallelism or DeepSpeed.
NO_SPLIT_ON_CPU, NO_SPLIT_HERE = "unsupported: splits need GPUs", "not measured: splits are other libraries'"


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    shape: str
    overrides: tuple[str, ...]
    tokens: int
    varlen: bool
    ranks: int


def samples(tokens: int, vocabulary: int, median: int) -> Pack:
    """A pack of exactly ``tokens``: samples of log-normal length, the last one cut; the same every time."""
    generator = torch.Generator().manual_seed(0)
    ends: list[int] = []
    while not ends or ends[-1] < tokens:
        length = int(math.exp(math.log(median) + SPREAD * torch.randn((), generator=generator).item()))
        ends.append(min(tokens, (ends[-1] if ends else 0) + min(max(length, 2), LONGEST)))
    tokens_T = torch.randint(vocabulary, (tokens,), generator=generator)
    learned_T = torch.ones(tokens, dtype=torch.bool)
    for start, end in pairwise((0, *ends)):
        learned_T[start : start + int((end - start) * PROMPT)] = False
    return Pack(tokens_T, learned_T, tuple(ends))


def their_ways(varlen: bool, device: torch.device) -> list[Way]:
    """What transformers offers; which of it is quickest depends on the machine."""
    attentions = ["sdpa"]
    if device.type != "cpu" and importlib.util.find_spec("flash_attn"):
        attentions.append("flash_attention_2")
    ways = []
    for attention, experts in product(attentions, ("grouped_mm", "eager")):
        ways.append(Way(f"{attention}, {experts}, one row", False, experts, attention))
        if varlen:
            ways.append(
                Way(f"{attention}, {experts}, a pass a sample", False, experts, attention, one_by_one=True)
            )
    return ways


class Table:
    """Measures rows."""

    def __init__(
        self, arguments: argparse.Namespace, device: torch.device, dtype: str, scratch: Path
    ) -> None:
        self._arguments, self._device, self._dtype, self._scratch = arguments, device, dtype, scratch
        self._folders: dict[str, Path] = {}
        self.tried: list[dict[str, Any]] = []

    def rows(self) -> Iterator[dict[str, Any]]:
        arguments = self._arguments
        for shape, overrides in SHAPES[arguments.shapes].items():
            if arguments.models and shape not in arguments.models:
                continue
            for tokens, varlen in product(arguments.tokens, arguments.varlen):
                for ranks in arguments.sequence_parallel:
                    yield self._row(Row(shape, (*overrides, *arguments.set), tokens, varlen, ranks))

    def _task(self, row: Row) -> Task:
        arguments = self._arguments
        config = load_config(row.shape, row.overrides)
        if row.shape not in self._folders:
            self._folders[row.shape] = self._scratch / row.shape
            write = (row.shape, row.overrides, self._folders[row.shape])
            process = multiprocessing.get_context("spawn").Process(target=write_folder_alone, args=write)
            process.start()
            process.join()
        return Task(
            row.shape,
            row.overrides,
            self._folders[row.shape],
            samples(row.tokens, config.architecture.vocabulary, arguments.median_length),
            row.varlen,
            self._dtype,
            arguments.backend,
            torch.get_num_threads(),
            arguments.processor_time,
            int(arguments.memory_gib * 2**30),
        )

    def _row(self, row: Row) -> dict[str, Any]:
        task = self._task(row)
        ours = Way("portmoe", ours=True, ranks=row.ranks)
        theirs = self._quickest(row, task) if row.ranks == 1 and self._arguments.theirs else None
        with ExitStack() as stack:
            sides = {"ours": self._opened(stack, task, ours)}
            if theirs is not None:
                sides["theirs"] = self._opened(stack, task, theirs)
            steps = _in_turn(sides, self._arguments.rounds)
        first = [side.first.loss for side in sides.values()]
        figures = {
            "shape": row.shape,
            "tokens": row.tokens,
            "varlen": "yes" if row.varlen else "no",
            "sequence parallel": row.ranks,
        }
        for name, of_side in steps.items():
            figures |= _figures(name, of_side, row)
        if "theirs" in steps:
            figures["their way"] = theirs.name
            if not any(step.failure for of_side in steps.values() for step in of_side):
                times = {name: [step.seconds for step in of_side] for name, of_side in steps.items()}
                figures["speed over theirs (median)"] = ratio(times["theirs"], times["ours"])
                figures["peak over theirs"] = steps["ours"][-1].peak_bytes / steps["theirs"][-1].peak_bytes
                figures["first losses apart"] = abs(first[0] - first[1])
        elif row.ranks > 1:
            on_cpu = self._device.type == "cpu"
            figures["theirs tokens/s a rank"] = NO_SPLIT_ON_CPU if on_cpu else NO_SPLIT_HERE
        return figures

    def _opened(self, stack: ExitStack, task: Task, way: Way) -> Contestant:
        """Ready to step; with gradient checkpointing, if a first step does not fit without."""
        contestant = stack.enter_context(closing(Contestant(task, way, self._scratch)))
        if contestant.first.failure == OUT_OF_MEMORY and not way.recompute:
            contestant.close()
            return self._opened(stack, task, replace(way, recompute=True))
        return contestant

    def _quickest(self, row: Row, task: Task) -> Way | None:
        """Their quickest way, by a step after one that warms up; None where ``--ways`` leaves none."""
        best: tuple[float, Way] | None = None
        ways = [way for way in their_ways(row.varlen, self._device) if self._arguments.ways in way.name]
        if len(ways) < 2:
            return next(iter(ways), None)
        for way in ways:
            for recompute in (False, True):
                tried = replace(way, recompute=recompute)
                with closing(Contestant(task, tried, self._scratch)) as contestant:
                    step = contestant.step()
                if step.failure != OUT_OF_MEMORY:
                    break
            self.tried.append(
                {
                    "shape": row.shape,
                    "tokens": row.tokens,
                    "varlen": "yes" if row.varlen else "no",
                    "way": way.name + ", gradient checkpointing" * recompute,
                    "tokens/s": step.failure or row.tokens / step.seconds,
                    "peak MiB": None if step.failure else step.peak_bytes / 2**20,
                }
            )
            if not step.failure and (best is None or step.seconds < best[0]):
                best = step.seconds, tried
        return best[1] if best else ways[0]


def _in_turn(sides: dict[str, Contestant], rounds: int) -> dict[str, list[Step]]:
    steps: dict[str, list[Step]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            steps[name].append(sides[name].step())
    return steps


def _figures(name: str, steps: Sequence[Step], row: Row) -> dict[str, Any]:
    if failure := next((step.failure for step in steps if step.failure), None):
        return {f"{name} tokens/s a rank": failure}
    seconds = [step.seconds for step in steps]
    return {
        f"{name} tokens/s a rank": row.tokens / row.ranks / statistics.median(seconds),
        f"{name}, best": row.tokens / row.ranks / min(seconds),
        f"{name} peak MiB a rank": max(step.peak_bytes for step in steps) / 2**20,
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shapes", choices=SHAPES, default="tiny")
    parser.add_argument("--models", nargs="+", help="only these of the shapes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384], help="of a pack")
    parser.add_argument("--varlen", choices=("yes", "no"), nargs="+", default=["no", "yes"])
    parser.add_argument("--sequence-parallel", type=int, nargs="+", default=[1, 2, 4], metavar="RANKS")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--median-length", type=int, default=256, help="of a sample")
    parser.add_argument(
        "--ways", default="", metavar="PART", help="only transformers' ways with this in their name"
    )
    parser.add_argument("--only-ours", dest="theirs", action="store_false")
    parser.add_argument(
        "--memory-gib",
        type=float,
        default=host_memory().total / 2**31,
        help="that a process may have on the CPU",
    )
    arguments = parser.parse_args()
    arguments.varlen = [value == "yes" for value in arguments.varlen]
    bench = open_bench(arguments)
    if arguments.theirs and importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: only portmoe is measured")
        arguments.theirs = False
    no_units = bench.device.type == "cpu" and slow_in(torch.bfloat16)
    dtype = ("float32" if no_units else "bfloat16") if arguments.dtype == "auto" else arguments.dtype
    if no_units:
        print("this processor has no units for 16-bit products")
    with tempfile.TemporaryDirectory() as scratch:
        table = Table(arguments, bench.device, dtype, Path(scratch))
        rows = []
        for row in table.rows():
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)
    if table.tried:
        report(
            bench, "transformers' ways, the second step of each", table.tried, argparse.Namespace(json=None)
        )
    report(bench, f"Full fine-tuning in {dtype}", rows, arguments)


if __name__ == "__main__":
    main()
