"""A short training run of a shrunken tiny_moe4 in float32, against one recorded on a CPU.

``python -m portmoe.verify.runs.training_run`` records the reference anew, with the plain references of
all operations: after a change to the model, the data or the schedule, and never to make a backend pass.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from portmoe.files import json_text, write_whole
from portmoe.ops import OPERATIONS
from portmoe.ops.table import REFERENCE
from portmoe.record.flat import as_now
from portmoe.record.writers import METRICS, read_metrics
from portmoe.result import Result
from portmoe.verify.backend.report import Curve
from portmoe.verify.machine.child import run_python
from portmoe.verify.runs.curves import Distance, distance, group_norms, layer_norms
from portmoe.verify.runs.thresholds import FLOAT32, Thresholds

CONFIG_FILE, REFERENCE_FILE = "reference_run.yaml", "reference_run.json"
KEPT = re.compile(r"step|loss|moe_loss|grad_norm(_layers)?/.+|dropped_token_rate")


def reference() -> list[dict[str, Any]]:
    """The recorded steps."""
    text = files("portmoe.verify.runs").joinpath(REFERENCE_FILE).read_text(encoding="utf-8")
    return [as_now(step) for step in json.loads(text)["steps"]]


def check_training(backend: str, timeout: float) -> tuple[list[Result], list[Curve]]:
    """Train in a child process and compare; ``timeout`` in seconds."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="portmoe-") as folder:
        directory = Path(folder, "run")
        outcome = run_python([_command(backend, directory)], {}, timeout)[0]
        seconds = time.perf_counter() - began
        run = list(read_metrics(directory / METRICS)) if (directory / METRICS).exists() else []
    if outcome.ending is not None:
        detail = f"{outcome.ending} after {len(run)} steps: {outcome.last_line}"
        return [
            Result("fail", "completes", detail, part="training", subject="reference run", seconds=seconds)
        ], []
    checks = [Result("pass", "completes", part="training", subject="reference run", seconds=seconds)]
    return checks + list(compare_with(reference(), run)), list(_curves(reference(), run))


def compare_with(
    recorded: Sequence[dict[str, Any]], run: Sequence[dict[str, Any]], limits: Thresholds = FLOAT32
) -> Iterator[Result]:
    """Yield one result per quantity."""
    if len(run) != len(recorded):
        detail = f"{len(run)} steps instead of {len(recorded)}"
        yield Result("fail", "steps", detail, part="training", subject="reference run")
        return
    for key, band in (("loss", limits.loss), ("moe_loss", limits.loss)):
        yield _check(distance(key, [r[key] for r in recorded], [r[key] for r in run]), band)
    for norms, band, first in (
        (group_norms, limits.norm, limits.first_norm),
        (layer_norms, limits.layer_norm, limits.first_layer_norm),
    ):
        for found in norms(recorded, run):
            yield _check(found, band, first)


def _check(found: Distance, band: float, first: float | None = None) -> Result:
    step = found.leaves([band if first is None else first, *[band] * len(found.relative)])
    detail = (
        ""
        if step is None
        else f"leaves the band at step {step}: {found.second[step]}, recorded {found.first[step]}"
    )
    status = "pass" if step is None else "fail"
    return Result(
        status,
        found.label,
        detail,
        part="training",
        subject="reference run",
        needed=found.largest,
        allowed=band,
    )


def _curves(recorded: Sequence[dict[str, Any]], run: Sequence[dict[str, Any]]) -> Iterator[Curve]:
    if len(run) != len(recorded):
        return
    yield Curve("loss", [r["loss"] for r in recorded], [r["loss"] for r in run])
    for found in group_norms(recorded, run):
        yield Curve(found.label, found.first, found.second)


def _command(backend: str, directory: Path, **more: Any) -> list[str]:
    config = str(files("portmoe.verify.runs").joinpath(CONFIG_FILE))
    keys = {"run.directory": str(directory)} | more
    settings = [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return [
        "-m",
        "portmoe",
        "train",
        "--config",
        config,
        "--backend",
        backend,
        "--launcher",
        "local",
        *settings,
    ]


def record() -> None:
    """Train on the CPU with the references alone, and write the steps beside this file."""
    from portmoe.accelerator import get_accelerator

    offered = get_accelerator("cpu").ops.implementations()
    disabled = [f"{i.op}.{i.name}" for i in offered]
    assert REFERENCE not in {i.name for i in offered}
    with tempfile.TemporaryDirectory(prefix="portmoe-") as folder:
        directory = Path(folder, "run")
        subprocess.run([sys.executable, *_command("cpu", directory, **{"ops.disable": disabled})], check=True)
        recorded = read_metrics(directory / METRICS)
        steps = [{key: step[key] for key in step if KEPT.fullmatch(key)} for step in recorded]
        environment = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    content = {
        "config": CONFIG_FILE,
        "operations": dict.fromkeys(OPERATIONS, REFERENCE),
        "recorded with": {"device": environment["device"], "packages": environment["packages"]},
        "steps": steps,
    }
    place = Path(__file__).with_name(REFERENCE_FILE)
    write_whole(place, json_text(content, indent=1) + "\n")


if __name__ == "__main__":
    record()
