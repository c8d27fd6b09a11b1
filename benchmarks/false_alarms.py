"""Right runs of tiny_moe4 as shipped, judged by compare: other threads, implementations, layouts, devices.

``train FOLDER`` makes the runs that are not there yet, ``table FOLDER`` prints every pair's verdict as
Markdown and ends with 1 if a pair was rejected:

    python benchmarks/false_alarms.py train false-alarms
    python benchmarks/false_alarms.py table false-alarms
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from portmoe.verify.runs import comparison_report
from portmoe.verify.runs.comparison import Comparison, compare
from portmoe.verify.runs.recorded import read_run

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parent / "tests" / "simulated" / "plugin"
DTYPES = ("float32", "bfloat16")
TWINS = 3
LAYOUTS = {
    "2 ranks, experts spread": (2, ()),
    "4 ranks, experts spread": (4, ()),
    "2 ranks, tensor mtp": (2, ("parallel.tensor.size=2",)),
    "4 ranks, tensor msp × 2": (4, ("parallel.tensor.size=2", "parallel.tensor.mode=msp")),
    "2 ranks, isp": (2, ("parallel.tensor.size=2", "parallel.tensor.mode=isp")),
    "2 ranks, pipeline": (2, ("parallel.pipeline.size=2",)),
    "2 ranks, fsdp": (2, ("parallel.zero1.fsdp=true", "parallel.expert.size=1")),
}


@dataclass(frozen=True)
class Job:
    """One run: what differs from the reference, in words and as options."""

    name: str
    settings: Sequence[str] = ()
    options: Sequence[str] = ()
    threads: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in self.name)


def jobs(reference: Path) -> Iterator[Job]:
    """The runs to hold beside ``reference``, a run of the same dtype."""
    yield Job("2 threads", threads=2)
    paths = [str(PLUGIN), os.environ.get("PYTHONPATH", "")]
    device = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    yield Job("simulated NPU", (), ("--backend", "npu"), variables=device)
    for name, (ranks, settings) in LAYOUTS.items():
        yield Job(name, settings, ("--nproc", str(ranks)))
    for op, record in json.loads((reference / "ops.json").read_text(encoding="utf-8")).items():
        usable = [made["name"] for made in record["candidates"] if made["usable"]]
        for place in range(1, len(usable)):
            out = ", ".join(f"{op}.{name}" for name in usable[:place])
            yield Job(f"{op}: {usable[place]}", (f"ops.disable=[{out}]",))


def train(folder: Path, start: Sequence[str], share: tuple[int, int]) -> None:
    """Make the runs that are not finished."""
    for dtype in DTYPES:
        twins = (Job(f"reference-twin{n}", (f"run.twin={n}",)) for n in range(1, TWINS + 1))
        for job in [Job("reference"), *twins][share[0] :: share[1]]:
            make(folder, dtype, job, start)
    todo = []
    for dtype in DTYPES:
        while not (folder / dtype / "reference" / "ops.json").is_file():  # the other share makes it
            time.sleep(1)
        todo += [(place, dtype, job) for place, job in enumerate(jobs(folder / dtype / "reference"))]
    for _, dtype, job in sorted(todo, key=lambda one: one[0])[share[0] :: share[1]]:
        make(folder, dtype, job, start)


def make(folder: Path, dtype: str, job: Job, start: Sequence[str]) -> None:
    """Train one run, where it is not finished."""
    directory = folder / dtype / job.folder
    if '"finished"' in _text(directory / "status.json"):
        return
    print(f"{dtype}, {job.name}", flush=True)
    settings = [*job.settings, f"model.dtype={dtype}", f"run.directory={directory}"]
    settings += ["ckpt.enable_save_ckpt=false"]
    backend = () if "--backend" in job.options else ("--backend", "cpu")
    # Threads that wait without spinning: other runs may need the cores.
    threads = (f"OMP_NUM_THREADS={job.threads}", "OMP_WAIT_POLICY=passive")
    command = [*start, "env", *threads, sys.executable, "-m", "portmoe", "train"]
    command += [*backend, *job.options, *(part for key in settings for part in ("--set", key))]
    done = subprocess.run(command, env=os.environ | job.variables, capture_output=True, text=True)
    if done.returncode:
        print(f"  ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}", flush=True)


def table(folder: Path) -> int:
    """Print the verdict of every run beside the reference, and of each beside the next one.

    Returns how many pairs were rejected.
    """
    rejected = judged = 0
    print("| dtype | beside the reference | verdict | of a step's band | of a later figure |")
    print("|---|---|---|---|---|")
    for dtype in DTYPES:
        runs = [
            run for run in sorted((folder / dtype).iterdir()) if '"finished"' in _text(run / "status.json")
        ]
        twins = [run for run in runs if "-twin" in run.name]
        read = {run.name: read_run(run) for run in runs if run not in twins}
        names = {job.folder: job.name for job in jobs(folder / dtype / "reference")}
        others = [name for name in read if name != "reference"]
        for first, second in [*(("reference", name) for name in others), *pairwise(others)]:
            found = compare(read[first], read[second], twins)
            judged, rejected = judged + 1, rejected + (not found.passed)
            verdict = "agree" if found.passed else comparison_report.verdict(found)
            if first == "reference":
                shares = (max(_shares(found, later)) for later in (False, True))
                cells = (dtype, names.get(second, second), verdict, *(f"{share:.3f}" for share in shares))
                print(f"| {' | '.join(cells)} |")
            elif not found.passed:
                print(f"| {dtype} | {second}, beside {first} | {verdict} | | |")
    print(f"\n{judged} pairs in all, each with {len(twins)} twins of the reference; {rejected} rejected")
    return rejected


def _shares(found: Comparison, later: bool) -> Iterator[float]:
    """How much was needed of what is allowed: of the bands of single steps, or of later figures."""
    yield 0.0
    for j in found.quantities:
        if later:
            yield from (figure.value / figure.allowed for figure in j.later)
        else:
            steps = zip(j.distance.relative, j.bands, strict=False)
            yield from (apart / band for apart, band in steps if not math.isnan(apart))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def main() -> int:
    """Read the command line."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("what", choices=("train", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--start", default="", help="a command to start each run with, as 'nice -n 5'")
    parser.add_argument("--share", default="0/1", help="of the runs to make, as 0/2 and 1/2 side by side")
    given = parser.parse_args()
    if given.what == "train":
        train(given.folder, shlex.split(given.start), tuple(map(int, given.share.split("/"))))
        return 0
    return 1 if table(given.folder) else 0


if __name__ == "__main__":
    sys.exit(main())
