"""What a run directory says of a run, held against the benchmark's rules and against itself."""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from portmoe.config import Config
from portmoe.costs.parameters import count_parameters
from portmoe.data import check_data
from portmoe.errors import PortmoeError
from portmoe.files import json_object
from portmoe.parallel.layout import Layout
from portmoe.record import acceptance
from portmoe.record.run_directory import CONFIG, ENVIRONMENT, OPERATIONS, STATUS
from portmoe.record.writers import LOG
from portmoe.result import Result
from portmoe.verify.acceptance.rules import differences
from portmoe.verify.acceptance.speed import Window, window
from portmoe.verify.runs.recorded import Run, read_run

NEEDED = (
    "portmoe",
    "commit",
    "python",
    "packages",
    "platform",
    "backend",
    "device",
    "facts",
    "ranks",
    "data",
)
SAME_RATE = 1e-3  # relative: tokens, seconds and rates of a step are rounded nowhere
RESUMED = re.compile(r"resumed at step (\d+)")


@dataclass(frozen=True)
class Acceptance:
    """Everything found about one run.

    Attributes:
        benchmark: what it is held against.
        results: rule by rule; a fail is a rule broken or a fact that is missing or contradicts another.
        facts: by group, names and values.
        window: the figures; None where they are not recorded.
    """

    run: Run
    benchmark: str
    results: list[Result]
    facts: dict[str, dict[str, Any]]
    window: Window | None

    @property
    def failed(self) -> list[Result]:
        """The rules broken and the facts missing."""
        return [result for result in self.results if result.status == "fail"]

    @property
    def passed(self) -> bool:
        return not self.failed


def examine(path: Path, benchmark: Config, name: str) -> Acceptance:
    """Hold the run in ``path`` against ``benchmark``, a config called ``name``.

    Raises:
        ConfigError: the directory holds no run.
    """
    run = read_run(path)
    # What is missing or broken is a finding of its own.
    environment, ops, status = (json_object(path / file) for file in (ENVIRONMENT, OPERATIONS, STATUS))
    log = (path / LOG).read_text(encoding="utf-8", errors="replace") if (path / LOG).is_file() else ""
    figures = window(run.steps)
    results = [
        *differences(run.config, benchmark),
        *_model(run, benchmark),
        *_batch(run, benchmark),
        *_data(run, environment),
        *_steps(run),
        *_loss(run),
        *_recorded(run, environment, ops, status, log, figures),
    ]
    facts = _facts(path, run, environment, ops, status, log)
    return Acceptance(run, name, results, facts, figures)


def _model(run: Run, benchmark: Config) -> Iterator[Result]:
    mine, theirs = count_parameters(run.config), count_parameters(benchmark)
    said = f"{mine.total:,} parameters, {mine.active:,} active per token"
    same = (mine.total, mine.active) == (theirs.total, theirs.active)
    yield _rule(
        "model", "parameters", same, said, f"{said}; the benchmark has {theirs.total:,} and {theirs.active:,}"
    )


def _batch(run: Run, benchmark: Config) -> Iterator[Result]:
    most = benchmark.data.max_global_batch_size
    tokens = {b["num_consumed_tokens"] - a["num_consumed_tokens"] for a, b in pairwise(run.steps)}
    if run.steps[0]["step"] == 0:
        tokens.add(run.steps[0]["num_consumed_tokens"])
    if len(tokens) != 1:
        yield Result(
            "fail", "global batch", f"the steps took {sorted(tokens)} tokens: not all the same", part="batch"
        )
        return
    batch = tokens.pop() / run.config.data.seq_len
    said = f"{batch:g} sequences of {run.config.data.seq_len} tokens"
    yield _rule(
        "batch",
        "global batch",
        most is None or batch <= most,
        f"{said}, {most or 'any number'} allowed",
        f"{said}: more than {most}",
    )
    try:
        planned = Layout.plan(run.config, run.ranks).global_batch_sequences
    except PortmoeError as error:
        yield Result("fail", "layout", f"the config does not fit {run.ranks} ranks: {error}", part="batch")
        return
    both = f"{planned} sequences by config and ranks, {batch:g} by the tokens counted"
    yield _rule("batch", "batch as configured", planned == batch, both, both)


def _data(run: Run, environment: dict[str, Any]) -> Iterator[Result]:
    yield _rule(
        "data",
        "dummy data",
        run.on_dummy_data,
        "the built-in dummy data",
        f"data.train_folder={run.config.data.train_folder!r}",
    )
    recorded = environment.get("data", {}).get("train")
    if not run.on_dummy_data or recorded is None:
        return
    try:
        layout = Layout.plan(run.config, run.ranks)
        here = check_data(run.config, layout.data, layout.micro_num)["train"]
    except PortmoeError as error:
        yield Result("fail", "checksum", f"cannot be computed here: {error}", part="data")
        return
    yield _rule(
        "data",
        "checksum",
        here == recorded,
        f"sha256 {here['sha256']}, as computed here anew",
        f"recorded {recorded}, and made here {here}",
    )


def _steps(run: Run) -> Iterator[Result]:
    numbers = [step["step"] for step in run.steps]
    gaps = [number for number, following in pairwise(numbers) if following != number + 1]
    whole = numbers[0] == 0 and not gaps
    where = f"begins at step {numbers[0]}" if numbers[0] else f"a gap after step {gaps[0]}" if gaps else ""
    yield _rule("steps", "recorded", whole, f"steps 0 … {numbers[-1]}, each once", where)
    skipped = run.steps[-1].get("inf_nan_skip_batches")
    if skipped is None:
        yield Result("fail", "skipped steps", "not recorded", part="steps")
    else:
        status = "warn" if skipped else "pass"
        yield Result(status, "skipped steps", f"{skipped} skipped for inf or nan gradients", part="steps")


def _loss(run: Run) -> Iterator[Result]:
    late = [(step["step"], step["loss"]) for step in run.steps if step["step"] >= acceptance.FIRST_STEP]
    name = acceptance.RULE
    if not late:
        yield Result(
            "fail",
            name,
            f"no step from {acceptance.FIRST_STEP} on: the last is {run.steps[-1]['step']}",
            part="loss",
        )
        return
    lost = [step for step, loss in late if loss is None]
    if lost:
        yield Result("fail", name, f"no loss at step {lost[0]}", part="loss")
        return
    step, largest = max(late, key=lambda pair: pair[1])
    margin = acceptance.LIMIT - largest
    said = f"largest {largest:.6g} at step {step}, a margin of {margin:.4g}; last {late[-1][1]:.6g}"
    yield _rule(
        "loss", name, largest < acceptance.LIMIT, said, said, needed=largest, allowed=acceptance.LIMIT
    )


def _recorded(
    run: Run,
    environment: dict[str, Any],
    ops: dict[str, Any],
    status: dict[str, Any],
    log: str,
    figures: Window | None,
) -> Iterator[Result]:
    """Facts that must be there and agree with each other."""
    for key in NEEDED:
        if environment.get(key) in (None, "", {}, []):
            why = "not recorded: installed without a checkout" if key == "commit" else f"not in {ENVIRONMENT}"
            yield Result("warn" if key == "commit" else "fail", key, why, part="record")
    yield _rule(
        "record",
        OPERATIONS,
        bool(ops),
        f"{len(ops)} operations",
        "missing or empty: no one can say what computed",
    )
    yield _rule("record", LOG, bool(log), "there", "missing: restarts and the launch are unknown")
    state = status.get("state", "missing")
    yield _rule("record", "end", state == "finished", state, f"{STATUS} says {state!r}")
    yield _rule(
        "record", "speed", figures is not None, "rates, times and memory of every step", "a figure is missing"
    )
    wrong = [step["step"] for step in run.steps if not _adds_up(step, run)]
    said = f"tokens, seconds and rates do not fit at {len(wrong)} steps, first {wrong[0] if wrong else ''}"
    yield _rule("record", "times", not wrong, "tokens, seconds and rates of every step fit", said)
    for op, chosen in ops.items():
        for unmet in chosen.get("unmet", ()):
            yield Result("warn", f"{op}: asked for and not met", str(unmet), part="record")


def _adds_up(step: dict[str, Any], run: Run) -> bool:
    rate, seconds = step.get("tgs (tokens/gpu/second)"), step.get("step_time")
    if rate is None or seconds is None:
        return False
    first = run.steps[0]
    tokens = first["num_consumed_tokens"] / (first["step"] + 1)
    return math.isclose(rate * seconds * run.ranks, tokens, rel_tol=SAME_RATE)


def _facts(
    path: Path, run: Run, environment: dict[str, Any], ops: dict[str, Any], status: dict[str, Any], log: str
) -> dict[str, dict[str, Any]]:
    config = (path / CONFIG).read_bytes()
    machine = {key: environment.get(key) for key in NEEDED if key not in ("data", "facts", "packages")}
    machine |= environment.get("facts") or {}
    chosen = {op: record.get("chosen") for op, record in ops.items()}
    return {
        "run": {
            "directory": str(path),
            "config sha256": hashlib.sha256(config).hexdigest(),
            "state": status.get("state"),
            "began again at steps": [int(step) for step in RESUMED.findall(log)],
            "parallel": run.config.parallel.model_dump(),
            "dtype": run.config.model.dtype,
        },
        "machine": machine,
        "versions": environment.get("packages") or {},
        "variables": environment.get("variables") or {},
        "operations": chosen,
    }


def _rule(part: str, name: str, met: bool, yes: str, no: str, **figures: float) -> Result:
    return Result("pass" if met else "fail", name, yes if met else no, part=part, **figures)
