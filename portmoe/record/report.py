"""What a run begins with and ends with: in full for train.log, and in a few lines for the terminal."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from portmoe.record import acceptance
from portmoe.record.acceptance import Verdict
from portmoe.record.progress import duration
from portmoe.record.writers import EVENTS, METRICS, read_metrics

PLAIN = "reference"  # what every operation's plain implementation is called
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class RunFacts:
    """What is known before the first step; the strings are shown as they are."""

    config: str  # where the config came from
    model: str  # layers, hidden size and experts, in words
    backend: str
    device: str
    layout: str
    ranks: str  # host and device of each; a line for each host
    number_of_ranks: int
    parameters: int
    active_parameters: int  # per token
    dtype: str
    global_batch: int  # sequences
    seq_len: int
    first_step: int
    total_steps: int
    directory: Path
    origin: str  # what the directory is to this run, see ``RunDirectory.origin``
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
        "model": facts.model,
        "parameters": f"{facts.parameters:,} ({active}), {facts.dtype}",
        "batch": f"{facts.global_batch} sequences of {facts.seq_len} = {tokens:,} tokens",
        "steps": f"{facts.total_steps}{resumed}",
        "run": f"{facts.directory}, {facts.origin}",
        "operations": ", ".join(f"{op}={chosen}" for op, chosen in facts.operations.items()),
        "environment": " ".join(f"{name}={value}" for name, value in facts.variables.items()) or "as it is",
    }
    lines = [f"{name:<11} {text}" for name, text in rows.items()]
    return "\n".join([*lines, *(f"note: {note}" for note in facts.notes)])


def start_lines(facts: RunFacts) -> str:
    """The same in five short lines, then the notes; keys without effect are named only."""
    plain = sum(chosen == PLAIN for chosen in facts.operations.values())
    ranks = f", {facts.number_of_ranks} ranks" if facts.number_of_ranks > 1 else ""
    tokens = facts.global_batch * facts.seq_len
    rows = {
        "model": f"{facts.model}, {_short(facts.parameters)} parameters "
        f"({_short(facts.active_parameters)} active)",
        "device": f"{facts.backend} ({facts.device}){ranks}",
        "batch": f"{facts.global_batch} × {facts.seq_len} = {tokens:,} tokens, {facts.total_steps:,} steps, "
        f"{facts.dtype}",
        "kernels": f"{len(facts.operations)} chosen, {plain} of them plain references (names: ops.json)",
        "run": f"{facts.directory}, {facts.origin}",
    }
    lines = [f"{name:<8} {text}" for name, text in rows.items()]
    void = [note.partition(" ")[0] for note in facts.notes if " has no effect: " in note]
    others = [note for note in facts.notes if " has no effect: " not in note]
    if void:
        others.append(f"no effect here: {', '.join(void)} (why: train.log)")
    return "\n".join([*lines, *(f"note: {note}" for note in others)])


@dataclass(frozen=True)
class Summary:
    """What a run came to; the verdict is None where the benchmark's acceptance does not apply."""

    text: str
    verdict: Verdict | None


def end_summary(
    directory: Path,
    seconds: float,
    dummy_data: bool,
    reason: str = "finished",
    ranks: int = 1,
    again: str | None = None,
    follows: Sequence[str] = (),
) -> Summary:
    """What a run came to, read from its ``metrics.jsonl``, the steps before a resumption included.

    Args:
        directory: of the run.
        seconds: for which this process trained.
        dummy_data: the benchmark's acceptance applies.
        reason: why training ended.
        ranks: over which the tokens were spread.
        again: the command that goes on with the run, where one does.
        follows: what a finished run of this kind is for, as commands.
    """
    losses: dict[int, float | None] = {}
    last = None
    for last in read_metrics(directory / METRICS):
        losses[last["step"]] = last["loss"]
    if last is None:
        return Summary(f"{reason} before the first step; run directory {directory}", None)
    verdict = None
    if dummy_data:
        verdict = acceptance.judge([loss for step, loss in losses.items() if step >= acceptance.FIRST_STEP])
    rows = {
        "loss": _curve(list(losses.values())),
        "speed": _speed(last, ranks),
        "acceptance": verdict.text if verdict else "",
        "drops": _drops(last),
        "run": str(directory),
    }
    width = max(map(len, rows))
    lines = [f"{reason} after step {last['step']} in {duration(seconds)}"]
    lines += [f"{name:<{width}} {text}" for name, text in rows.items() if text]
    steps = _next(directory, again, follows)
    lines += [f"{'next' if not row else '':<{width}} {step}" for row, step in enumerate(steps)]
    return Summary("\n".join(lines), verdict)


def sparkline(values: Sequence[float | None], width: int = 24) -> str:
    """The course of ``values`` in at most ``width`` characters; what is not finite is a blank."""
    bins = min(width, len(values))
    means = []
    for number in range(bins):
        part = values[number * len(values) // bins : (number + 1) * len(values) // bins]
        finite = [value for value in part if value is not None and math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else None)
    known = [mean for mean in means if mean is not None]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    top = len(BLOCKS) - 1
    return "".join(
        " " if mean is None else BLOCKS[round((mean - low) / span * top) if span else 0] for mean in means
    )


def _curve(losses: Sequence[float | None]) -> str:
    first, last = ("nan" if loss is None else f"{loss:.4f}" for loss in (losses[0], losses[-1]))
    return f"{first} → {last}  {sparkline(losses)}"


def _speed(last: Mapping[str, float], ranks: int) -> str:
    each = f" ({last['tgs/tgs_all']:,.1f} each of {ranks} ranks)" if ranks > 1 else ""
    return (
        f"{last['tgs/tgs_all'] * ranks:,.1f} tok/s over all time{each}, "
        f"{last['tgs/tgs_SMA'] * ranks:,.1f} in the last steps"
    )


def _drops(last: Mapping[str, float | None]) -> str:
    dropped, skipped = last.get("dropped_token_rate"), last["inf_nan_skip_batches"]
    told = [] if dropped is None else [f"{dropped:.2%} of the assignments to experts in the last step"]
    told += [f"{skipped} steps were skipped for inf or nan gradients"] if skipped else []
    return "; ".join(told)


def _next(directory: Path, again: str | None, follows: Sequence[str]) -> list[str]:
    """Commands that make sense now, with the real paths."""
    path = shlex.quote(str(directory))
    curves = f"tensorboard --logdir {path}/{EVENTS}"
    if again:
        return [again, curves, "portmoe runs"]
    return [curves, f"portmoe compare {path} OTHER_RUN --out compare.html", *follows, "portmoe runs"]


def _short(count: int) -> str:
    """As "11.9B"."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
