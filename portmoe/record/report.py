"""The block a run begins with and the summary it ends with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from portmoe.record.writers import METRICS, read_metrics

# The benchmark's acceptance on the built-in dummy data: from this step on the loss stays below the limit.
ACCEPTANCE_STEP = 50
ACCEPTANCE_LOSS = 0.325


@dataclass(frozen=True)
class RunFacts:
    """What is known before the first step; the strings are shown as they are."""

    config: str  # where the config came from
    backend: str
    device: str
    layout: str
    ranks: str  # host and device of each; a line for each host
    parameters: int
    active_parameters: int  # per token
    dtype: str
    global_batch: int  # sequences
    seq_len: int
    first_step: int
    total_steps: int
    directory: Path
    operations: Mapping[str, str]  # operation, or operation@site → chosen implementation
    variables: Mapping[str, str]  # of the environment, that steer the run
    notes: Sequence[str] = ()


def start_block(facts: RunFacts) -> str:
    """What is about to run, a line for each fact, then the notes."""
    resumed = f", resumed at step {facts.first_step}" if facts.first_step else ""
    active = f"{facts.active_parameters:,} active per token"
    tokens = facts.global_batch * facts.seq_len
    rows = {
        "config": facts.config,
        "backend": f"{facts.backend} ({facts.device})",
        "layout": facts.layout,
        "ranks": facts.ranks.replace("\n", "\n" + 12 * " "),
        "parameters": f"{facts.parameters:,} ({active}), {facts.dtype}",
        "batch": f"{facts.global_batch} sequences of {facts.seq_len} = {tokens:,} tokens",
        "steps": f"{facts.total_steps}{resumed}",
        "run": str(facts.directory),
        "operations": ", ".join(f"{op}={chosen}" for op, chosen in facts.operations.items()),
        "environment": " ".join(f"{name}={value}" for name, value in facts.variables.items()) or "as it is",
    }
    lines = [f"{name:<11} {text}" for name, text in rows.items()]
    return "\n".join([*lines, *(f"note: {note}" for note in facts.notes)])


def end_summary(directory: Path, seconds: float, dummy_data: bool, reason: str = "finished") -> str:
    """What a run came to, read from its ``metrics.jsonl``, the steps before a resumption included.

    Args:
        directory: of the run.
        seconds: for which this process trained.
        dummy_data: the benchmark's acceptance applies.
        reason: why training ended.
    """
    last, late_losses = None, []
    for last in read_metrics(directory / METRICS):
        if last["step"] >= ACCEPTANCE_STEP:
            late_losses.append(last["loss"])
    if last is None:
        return f"{reason} before the first step; run directory {directory}"
    duration = timedelta(seconds=round(seconds))
    loss = "nan" if last["loss"] is None else last["loss"]
    all_tgs, late_tgs = last["tgs/tgs_all"], last["tgs/tgs_SMA"]
    lines = [
        f"{reason} after step {last['step']} in {duration}: loss {loss}",
        f"tgs (tokens/gpu/second) {all_tgs:,.1f} over all time, {late_tgs:,.1f} in the last steps",
    ]
    if dummy_data:
        lines.append(_acceptance(late_losses))
    skipped = last["inf_nan_skip_batches"]
    if skipped:
        lines.append(f"{skipped} steps were skipped for inf or nan gradients")
    lines.append(f"run directory {directory}")
    return "\n".join(lines)


def _acceptance(late_losses: Sequence[float | None]) -> str:
    """``None`` stands for a loss that was not finite."""
    rule = f"loss < {ACCEPTANCE_LOSS} at every step from {ACCEPTANCE_STEP} on"
    if not late_losses:
        return f"acceptance ({rule}): not reached, more than {ACCEPTANCE_STEP} steps are needed"
    failed = [loss for loss in late_losses if loss is None or not loss < ACCEPTANCE_LOSS]
    if failed:
        return f"acceptance ({rule}): FAILED at {len(failed)} of {len(late_losses)} steps"
    return f"acceptance ({rule}): passed, largest {max(late_losses):.4f} of {len(late_losses)} steps"
