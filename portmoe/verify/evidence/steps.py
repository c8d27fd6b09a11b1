"""What of the recorded steps can be computed without a device: schedules, counts, sums, rates and times."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from portmoe.config import Config
from portmoe.config.sections.data import parse_step_ranges
from portmoe.costs.flops import benchmark_flops_per_token, model_flops_per_token
from portmoe.record.writers import LOG
from portmoe.result import Result
from portmoe.training.schedule import beta2, learning_rate
from portmoe.verify.evidence.chain import Walk
from portmoe.verify.evidence.directory import Directory, Line

PART = "steps"
Record = Mapping[str, Any]
EXACT = 1e-12  # two roundings of float64
SUMS = 1e-6  # of numbers that were float32 once
CLOCKS = 1.0  # seconds by which a clock may be set while a step runs
SHOWN = 10
# What every line has, as a number.
NUMBERS = (
    *("tgs (tokens/gpu/second)", "real_tgs", "step_time", "fwd_bwd_time", "bwd_time", "micro_num"),
    *("num_consumed_tokens", "lr", "adam_beta2", "loss_scale"),
)
# What every line has; null where it was no finite number.
FIGURES = ("moe_loss",)
_LOGGED = re.compile(r" step=(\d+) loss=(\S+) ")


@dataclass(frozen=True)
class Problem:
    """What is wrong with one line: which quantity, and how."""

    line: Line
    quantity: str
    detail: str
    status: str = "fail"


def check_steps(directory: Directory, walked: Walk) -> Iterator[Result]:
    """Recompute what can be; one result for every line that is wrong, or one that none is."""
    problems = list(_problems(directory, walked))
    for problem in problems[:SHOWN]:
        yield Result(
            "warn" if problem.status == "warn" else "fail",
            problem.quantity,
            problem.detail,
            subject=problem.line.place,
            part=PART,
        )
    if len(problems) > SHOWN:
        yield Result("fail", "and more", f"{len(problems) - SHOWN} more", subject="metrics.jsonl", part=PART)
    if not problems:
        detail = f"{len(directory.records)} steps: schedules, counts, sums, rates and times"
        yield Result("pass", "add up", detail, subject="metrics.jsonl", part=PART)


def _problems(directory: Directory, walked: Walk) -> Iterator[Problem]:
    before: Record | None = None
    logged = _logged(directory)
    begins = {start.first_step for start in walked.starts}
    step_tokens = tokens_per_step([record for _, record in directory.records])
    flops = {
        id(config): (benchmark_flops_per_token(config, recompute=True), model_flops_per_token(config))
        for config in (directory.config, *(start.config for start in walked.starts))
        if config is not None
    }
    for line, record in directory.records:
        config = walked.config_of(record["step"]) or directory.config
        new_start = record["step"] in begins
        missing = [key for key in NUMBERS if not isinstance(record.get(key), int | float)]
        missing += [key for key in FIGURES if not isinstance(record.get(key, ""), int | float | None)]
        if missing:
            yield Problem(line, missing[0], f"it is {record.get(missing[0], 'missing')}")
            continue
        checks: list[Iterable[tuple[str, str]]] = [_sums(record), _log(record, logged)]
        if config is not None:
            checks += [
                _order(record, before, config),
                _schedule(record, config),
                _rates(record, flops[id(config)], step_tokens),
            ]
            checks.append(_tokens(record, before, config, step_tokens))
        for quantity, detail in (found for check in checks for found in check):
            yield Problem(line, quantity, detail)
        for quantity, detail in _clock(record, None if new_start else before):
            yield Problem(line, quantity, detail, "warn")
        before = record
    yield from _end(directory)


def _order(record: Record, before: Record | None, config: Config) -> Iterator[tuple[str, str]]:
    """Steps follow each other, but for those that are passed over."""
    passed_over = parse_step_ranges(config.data.skip_batches)
    expected = 0 if before is None else before["step"] + 1
    while any(expected in steps for steps in passed_over):
        expected += 1
    if record["step"] == expected or (before is None and config.ckpt.load_ckpt_info is not None):
        return
    yield "step", f"it is {record['step']}, and {expected} should follow"


def _schedule(record: Record, config: Config) -> Iterator[tuple[str, str]]:
    step = record["step"]
    for key, value in (("lr", learning_rate(config, step)), ("adam_beta2", beta2(config, step))):
        if not _alike(record.get(key), value, EXACT):
            yield key, f"it is {record.get(key)}, and by the config {value}"
    if config.model.dtype != "float16" and record.get("loss_scale") != 1.0:
        yield "loss_scale", f"it is {record.get('loss_scale')}, and in {config.model.dtype} it is 1"


def _tokens(
    record: Record, before: Record | None, config: Config, step_tokens: int
) -> Iterator[tuple[str, str]]:
    """Every step takes the same global batch."""
    consumed = record["num_consumed_tokens"]
    labelled = sum(_labelled(record).values())
    if labelled > step_tokens:
        yield "tokens", f"{labelled} have a label of {step_tokens} in a step"
    padding, share = record.get("padding_share"), record.get("trained_token_share")
    if padding is not None:
        real = step_tokens * (1 - padding)
        expected = labelled / real if real else 0.0
        if not _alike(share, expected, SUMS):
            yield "trained_token_share", f"it is {share}, and by labels and padding {expected:.8g}"
    if step_tokens % (config.data.seq_len * config.data.micro_bsz * record["micro_num"]):
        yield "micro_num", f"it is {record['micro_num']}, and a step has {step_tokens} tokens"
    if before is not None and consumed - (before.get("num_consumed_tokens") or 0) != step_tokens:
        former = before.get("num_consumed_tokens")
        yield "num_consumed_tokens", f"it is {consumed} after {former}, and a step has {step_tokens}"


def _rates(record: Record, flops: tuple[float, float], step_tokens: int) -> Iterator[tuple[str, str]]:
    """Rates follow from tokens and seconds, and FLOP/s from rates and both counts of a token's."""
    tgs, seconds = record["tgs (tokens/gpu/second)"], record["step_time"]
    labelled = sum(_labelled(record).values())
    ranks = step_tokens / (tgs * seconds) if tgs and seconds else math.nan
    if not abs(ranks - round(ranks) if math.isfinite(ranks) else math.nan) < 1e-6 * max(ranks, 1.0):
        yield "tgs", f"{tgs:.6g} tokens a second in {seconds:.6g} s are no share of {step_tokens} tokens"
        return
    expected = {
        "tgs/last_tgs_1": tgs,
        "real_tgs": labelled / round(ranks) / seconds,
        "tflops": tgs * flops[0] / 1e12,
        "model_tflops": tgs * flops[1] / 1e12,
    }
    for key, value in expected.items():
        if not _alike(record.get(key), value, SUMS):
            yield key, f"it is {record.get(key)}, and by tokens and seconds {value:.8g}"
    parts = (("fwd_bwd_time", "step_time"), ("bwd_time", "fwd_bwd_time"))
    for part, whole in parts:
        if record[part] > 1.05 * record[whole] + 0.01:
            yield part, f"it is {record[part]:.6g} s of {record[whole]:.6g} s in {whole}"


def _labelled(record: Record) -> dict[str, int]:
    """Tokens with a label, by the names of the data."""
    return {key.partition("/")[2]: record[key] or 0 for key in record if key.startswith("tokens/")}


def _sums(record: Record) -> Iterator[tuple[str, str]]:
    """Figures that are sums of other ones."""
    counts = _labelled(record)
    labels = sum(counts.values())
    if labels:
        for key, part in (("loss_from_metric", "loss"), ("acc", "acc")):
            terms = [(record.get(f"{part}/{name}"), count) for name, count in counts.items() if count]
            if all(value is not None for value, _ in terms):
                mean = sum(value * count for value, count in terms) / labels
                if not _alike(record.get(key), mean, SUMS):
                    yield key, f"it is {record.get(key)}, and by its types {mean:.8g}"
    whole = record.get("loss_from_metric")
    if whole is not None and whole < 700 and not _alike(record.get("perplexity"), math.exp(whole), SUMS):
        found = record.get("perplexity")
        yield "perplexity", f"it is {found}, and exp(loss_from_metric) {math.exp(whole):.8g}"
    for key in [key for key in record if key.startswith("grad_norm/")]:
        group = key.removeprefix("grad_norm/")
        places = _column(record, f"grad_norm_layers/{group}/")
        known = bool(places) and None not in (*places, record[key])
        if known and not _alike(record[key], math.hypot(*places), SUMS):
            yield key, f"it is {record[key]:.8g}, and by its layers {math.hypot(*places):.8g}"
    parameters, groups = _column(record, "grad_norm_parameters/"), _column(record, "grad_norm/")
    if parameters and None not in (*parameters, *groups):
        total, by_groups = math.hypot(*parameters), math.hypot(*groups)
        if not _alike(total, by_groups, SUMS):
            yield "grad_norm_parameters", f"they come to {total:.8g}, and the groups to {by_groups:.8g}"
    load = _column(record, "expert_load/")
    if load and not _alike(sum(load), 1.0, SUMS):
        yield "expert_load", f"the shares come to {sum(load):.8g}"


def _column(record: Record, prefix: str) -> list[Any]:
    return [value for key, value in record.items() if key.startswith(prefix)]


def _logged(directory: Directory) -> dict[int, str]:
    """Step → loss as ``train.log`` has it, where it has the whole line."""
    path = directory.path / LOG
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return {int(step): loss for step, loss in _LOGGED.findall(text)}


def _log(record: Record, logged: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    said, loss = logged.get(record["step"]), record.get("loss")
    if said is not None and said != str(math.nan if loss is None else loss):
        yield "loss", f"it is {loss}, and {said} in {LOG}"


def _clock(record: Record, before: Record | None) -> Iterator[tuple[str, str]]:
    """Of two steps of one start; a clock may have been set, so that this is no more than odd."""
    if before is None:
        return
    try:
        ends = [datetime.fromisoformat(r["timestamp"]) for r in (before, record)]
    except (KeyError, TypeError, ValueError):
        yield "timestamp", f"it is {record.get('timestamp')}"
        return
    apart = (ends[1] - ends[0]).total_seconds()
    took = record["step_time"]
    if apart < 0.9 * took - CLOCKS:
        yield "timestamp", f"it is {apart:.3f} s after the line before, and the step took {took:.3f} s"


def _end(directory: Directory) -> Iterator[Problem]:
    """A run that says it is finished has made its last step."""
    if directory.state != "finished" or directory.config is None or not directory.records:
        return
    line, record = directory.records[-1]
    last = directory.config.data.total_steps - 1
    passed_over = parse_step_ranges(directory.config.data.skip_batches)
    while any(last in steps for steps in passed_over):
        last -= 1
    if record["step"] != last:
        detail = f"the last step is {record['step']}, and the run is finished with {last} (data.total_steps)"
        yield Problem(line, "step", detail)


def _alike(a: Any, b: float, tolerance: float) -> bool:
    return isinstance(a, int | float) and math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-300)


def tokens_per_step(records: Sequence[Record]) -> int:
    """The global batch in tokens, from how their count grows; 0 where there is no step."""
    counts = [record.get("num_consumed_tokens") or 0 for record in records]
    grown = Counter(b - a for a, b in pairwise(counts))
    return grown.most_common(1)[0][0] if grown else sum(counts)
