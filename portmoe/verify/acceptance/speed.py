"""The figures of a run over a stated window: tokens and FLOP/s, memory, drops and load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

WARM_UP = 5  # steps left out: kernels are compiled and buffers allocated in them


@dataclass(frozen=True)
class Window:
    """Steps and what they come to.

    Attributes:
        first, last: the steps, both within.
        tgs: tokens per rank and second: all tokens over all step time.
        tgs_median: of the steps'.
        tflops: 1e12 FLOP/s per rank by the benchmark's formula, which counts one expert a token.
        model_tflops: the same of all that the model really computes, without recomputation.
        mfu: of it, as a share of the device's data sheet; None where that is unknown.
        peak_memory: bytes, the most in any step of the run.
        dropped: mean share of assignments dropped; None for a dense model.
        load: mean share of assignments by expert.
    """

    first: int
    last: int
    tgs: float
    tgs_median: float
    tflops: float
    model_tflops: float
    mfu: float | None
    peak_memory: int
    dropped: float | None
    load: Sequence[float]


def window(steps: Sequence[Mapping[str, Any]]) -> Window | None:
    """The figures after the warm-up; of all steps where there are no more. None where a figure is missing."""
    counted = steps[WARM_UP:] or steps
    try:
        seconds = sum(step["step_time"] for step in counted)
        rates = [step["tgs (tokens/gpu/second)"] for step in counted]
        tgs = sum(rate * step["step_time"] for rate, step in zip(rates, counted, strict=True)) / seconds
        per_tgs = {key: counted[-1][key] / rates[-1] for key in ("tflops", "model_tflops")}
        dropped = [step["dropped_token_rate"] for step in counted]
        experts = [key for key in counted[-1] if key.startswith("expert_load/")]
        mfu = counted[-1].get("mfu")
        return Window(
            counted[0]["step"],
            counted[-1]["step"],
            tgs,
            median(rates),
            per_tgs["tflops"] * tgs,
            per_tgs["model_tflops"] * tgs,
            None if mfu is None else mfu / rates[-1] * tgs,
            max(step["peak_memory"] for step in steps),
            None if None in dropped else fmean(dropped),
            [fmean(step[key] for step in counted) for key in experts],
        )
    except (KeyError, TypeError, ZeroDivisionError):
        return None
