"""What one step reports: the benchmark's log line, key by key, and what portmoe adds to it.

``StepTotals`` is what a step's micro-batches come to over all ranks, ``StepResult`` that with what the
trainer measured around them; ``step_record`` makes the ordered record of it that goes to
``metrics.jsonl``; ``to_text`` and ``to_json`` print the record.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from portmoe.files import json_text
from portmoe.record.flat import flat, places
from portmoe.record.throughput import Speed


@dataclass(frozen=True)
class StepTotals:
    """One step's figures over the whole global batch, the same on every rank.

    ``loss`` is the mean over micro-batches of each one's mean over labelled tokens, nan where the whole batch
    has none, and ``aux_loss`` and ``z_loss`` the means over micro-batches of the losses of all layers; the
    per-type lists follow ``types`` and count labelled tokens; ``assigned`` and ``kept`` count
    assignments per expert over all layers, before and after drops.
    ``segments`` is the first data-parallel rank's number, as the benchmark logs it; ``largest_length`` is
    the longest segment in tokens, ``largest_batch`` and ``smallest_batch`` the most and fewest segments of a
    micro-batch. ``data_crc32`` is the sum of the micro-batches' checksums, ``padding`` counts tokens that are
    of no sample.
    """

    types: tuple[str, ...]
    loss: float
    aux_loss: float
    z_loss: float
    tokens: list[int]
    correct: list[int]
    loss_sums: list[float]
    assigned: list[int]
    kept: list[int]
    segments: int
    largest_length: int
    largest_batch: int
    smallest_batch: int
    stop_signal: int
    data_crc32: int = 0
    padding: int = 0


@dataclass(frozen=True)
class StepResult:
    """One step of the whole world: every number is already reduced over all ranks.

    Attributes:
        totals: the sums and means over the global batch.
        step: counted from 0.
        moe_loss: the auxiliary terms as they entered the training loss, times their coefficients.
        grad_norms: by parameter group, as ``model.parameters`` names them.
        layer_grad_norms: by parameter group, then embedding, every layer in order, final norm with head.
        learning_rate, beta2, loss_scale: as used in this step; next_learning_rate: as the next step will.
        skipped_steps: steps skipped for inf or nan gradients since the run began.
        micro_num: micro-batches per rank.
        consumed_tokens: of the run so far, this step included, with and without a label.
        step_tokens: those of this step.
        step_seconds: the whole step; forward_backward_seconds and backward_seconds are parts of it.
        peak_memory: bytes.
        parameter_grad_norms, weight_changes: by parameter; of a step that begins where a checkpoint was
            saved, so that it can be computed again from there, else empty.
    """

    totals: StepTotals
    step: int
    moe_loss: float
    grad_norms: Mapping[str, float]
    layer_grad_norms: Mapping[str, Sequence[float]]
    learning_rate: float
    next_learning_rate: float
    beta2: float
    loss_scale: float
    skipped_steps: int
    micro_num: int
    consumed_tokens: int
    step_tokens: int
    step_seconds: float
    forward_backward_seconds: float
    backward_seconds: float
    peak_memory: int
    parameter_grad_norms: Mapping[str, float] = field(default_factory=dict)
    weight_changes: Mapping[str, float] = field(default_factory=dict)


def step_record(result: StepResult, speed: Speed) -> dict[str, Any]:
    """The record of one step: the benchmark's keys in its order, then portmoe's.

    ``loss`` is the mean over micro-batches of their means; ``loss_from_metric``, ``acc`` and ``perplexity``
    weigh every labelled token of the step alike. A data type without a token has accuracy 0 and loss
    nan, as in the benchmark. ``num_samples_in_batch`` counts the segments of one data-parallel rank;
    ``largest_length`` is the longest one's tokens, ``largest_batch`` and ``smallest_batch`` are the most
    and the fewest in one micro-batch.

    ``trained_token_share`` is the share of the samples' tokens that are learned as a label, and
    ``padding_share`` the share of all tokens that are of no sample. ``dropped_token_rate`` is the share of
    assignments that no expert computed, ``expert_load`` each expert's share of the assignments before drops;
    both are over all layers, and None and [] for a dense model. ``grad_norm_layers`` has, by parameter group,
    the norm of the embedding's gradient, of every layer's, and of the final norm's with the head's.
    ``data_crc32`` tells the global batch, in hexadecimal.
    ``grad_norm_parameters`` and ``weight_change`` are there for the steps that begin at a checkpoint.
    Unrounded; times in seconds, ``peak_memory`` in bytes. No name depends on the layout.
    """
    totals = result.totals
    labels, loss_sum = sum(totals.tokens), sum(totals.loss_sums)
    mean_loss = _mean(loss_sum, labels, math.nan)
    assigned = sum(totals.assigned)
    return {
        "tflops": speed.tflops,
        "step": result.step,
        "loss": totals.loss,
        "real_tgs": speed.real_tgs,
        "tgs (tokens/gpu/second)": speed.tgs,
        "tgs/last_tgs_1": speed.tgs,
        "tgs/tgs_all": speed.tgs_all,
        "tgs/tgs_avg": speed.tgs_avg,
        "tgs/tgs_SMA": speed.tgs_sma,
        "tgs/last_tgs_10": speed.last_tgs_10,
        "tgs/last_tgs_50": speed.last_tgs_50,
        "lr": result.learning_rate,
        "loss_scale": result.loss_scale,
        "grad_norm": dict(result.grad_norms),
        "moe_loss": result.moe_loss,
        "micro_num": result.micro_num,
        "num_consumed_tokens": result.consumed_tokens,
        "inf_nan_skip_batches": result.skipped_steps,
        "num_samples_in_batch": totals.segments,
        "largest_length": totals.largest_length,
        "largest_batch": totals.largest_batch,
        "smallest_batch": totals.smallest_batch,
        "adam_beta2": result.beta2,
        "fwd_bwd_time": result.forward_backward_seconds,
        "bwd_time": result.backward_seconds,
        "acc": _mean(sum(totals.correct), labels, 0.0),
        "perplexity": perplexity(mean_loss),
        **_per_type("acc", totals.types, totals.correct, totals.tokens, 0.0),
        **{f"tokens/{name}": count for name, count in zip(totals.types, totals.tokens, strict=True)},
        "loss_from_metric": mean_loss,
        **_per_type("loss", totals.types, totals.loss_sums, totals.tokens, math.nan),
        "model_tflops": speed.model_tflops,
        "mfu": speed.mfu,
        "trained_token_share": _mean(labels, result.step_tokens - totals.padding, 0.0),
        "padding_share": totals.padding / result.step_tokens,
        "dropped_token_rate": 1 - sum(totals.kept) / assigned if assigned else None,
        "expert_load": [count / assigned for count in totals.assigned] if assigned else [],
        "grad_norm_layers": {group: places(norms) for group, norms in result.layer_grad_norms.items()},
        "step_time": result.step_seconds,
        "lr_next": result.next_learning_rate,
        "peak_memory": result.peak_memory,
        "data_crc32": f"{totals.data_crc32:08x}",
        "grad_norm_parameters": dict(result.parameter_grad_norms),
        "weight_change": dict(result.weight_changes),
    }


def to_text(record: Mapping[str, Any], expert_ranks: int) -> str:
    """``key=value key=value …``: losses and the like in full precision, rates and times rounded.

    What is too long for a line is in ``metrics.jsonl`` only. Two things are as the benchmark prints them, so
    that its log and this one can be laid side by side: ``lr`` is the rate after the schedule has moved on,
    and the parameter groups have names that tell over how many ranks the experts are spread.
    """
    names = {"default": "0_default", "fp32": "1_fp32", "experts": f"2_moe_ep_size_{expert_ranks}"}
    norms = {names.get(group, group): norm for group, norm in record.get("grad_norm", {}).items()}
    as_printed = {"grad_norm": norms, "lr": record.get("lr_next")}
    shown = [(key, as_printed.get(key, value)) for key, value in record.items() if key not in _NOT_PRINTED]
    return " ".join(f"{key}={_value_text(key, value)}" for key, value in shown)


def to_json(record: Mapping[str, Any]) -> str:
    """Return one flat object on a line of strict JSON: nan and infinities, which it lacks, become null."""
    return json_text(flat(record))


def perplexity(mean_loss: float) -> float:
    """exp(mean loss); inf where that is beyond a float."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def _per_type(
    key: str, types: Sequence[str], sums: Sequence[float], counts: Sequence[int], empty: float
) -> dict[str, float]:
    return {
        f"{key}/{name}": _mean(value, count, empty)
        for name, value, count in zip(types, sums, counts, strict=True)
    }


def _mean(value: float, count: int, empty: float) -> float:
    return value / count if count else empty


# Keys that are compared between runs keep every digit.
_EXACT = {"loss", "moe_loss", "lr", "loss_scale", "adam_beta2", "grad_norm"}
OF_REPLAY = ("data_crc32", "grad_norm_parameters", "weight_change")  # no curves
_NOT_PRINTED = {"lr_next", "grad_norm_layers", *OF_REPLAY}


def _value_text(key: str, value: Any) -> str:
    if value is None:
        return "nan"
    if isinstance(value, list):
        return "[" + ",".join(f"{item:.4f}" for item in value) + "]"
    if not isinstance(value, float) or key in _EXACT:
        return str(value)
    if "tgs" in key:
        return f"{value:.2f}"
    return str(float(f"{value:.5g}"))
