"""Tokens per second and FLOP/s, as the benchmark defines them and as the model really computes.

"tgs" is tokens per accelerator ("gpu") and second. All figures start anew when a run is resumed: the
time another process took, perhaps on other machines, is not this run's.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

SMA_WINDOW = 50


@dataclass(frozen=True)
class Speed:
    """The figures of one step. All tgs values in tokens per rank and second.

    Attributes:
        tgs: tokens of this step.
        real_tgs: tokens of this step that have a label.
        last_tgs_10, last_tgs_50: over the last complete window of 10 and 50 steps. Windows follow each
            other without overlap; before the first is complete the value is 0, as in the benchmark.
        tgs_all: all tokens over all time since the first step began: checkpoints, validation and
            everything else between the steps count.
        tgs_avg: mean of the steps' tgs.
        tgs_sma: tokens over step time in a sliding window of the last 50 steps (fewer at the start).
        tflops: 1e12 FLOP/s per rank by the BENCHMARK's formula: one expert per token, full attention.
        model_tflops: 1e12 FLOP/s per rank that the model needs without recomputation.
        mfu: ``model_tflops`` over the device's data-sheet peak; None where that is unknown.
    """

    tgs: float
    real_tgs: float
    last_tgs_10: float
    last_tgs_50: float
    tgs_all: float
    tgs_avg: float
    tgs_sma: float
    tflops: float
    model_tflops: float
    mfu: float | None


class Throughput:
    """Turns every step's tokens and seconds into its ``Speed``. Create it when the first step begins."""

    def __init__(
        self,
        world_size: int,
        benchmark_flops_per_token: float,
        model_flops_per_token: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            world_size: number of ranks.
            benchmark_flops_per_token: forward and backward by the benchmark's formula.
            model_flops_per_token: forward and backward as the model computes it.
            peak_flops: FLOP/s of one device in the training dtype; None if unknown.
            clock: seconds since any fixed moment.
        """
        self._world_size = world_size
        self._benchmark_flops = benchmark_flops_per_token
        self._model_flops = model_flops_per_token
        self._peak_flops = peak_flops
        self._clock = clock
        self._began = clock()
        self._steps = 0
        self._tokens = 0
        self._sum_tgs = 0.0
        self._window10 = _Window(10)
        self._window50 = _Window(50)
        self._recent: deque[tuple[int, float]] = deque(maxlen=SMA_WINDOW)

    def update(self, tokens: int, labelled_tokens: int, seconds: float) -> Speed:
        """Take in one step.

        Args:
            tokens: of the global batch.
            labelled_tokens: those of them that have a label.
            seconds: the step took, greater than 0.
        """
        tgs = tokens / self._world_size / seconds
        self._steps += 1
        self._tokens += tokens
        self._sum_tgs += tgs
        self._recent.append((tokens, seconds))
        recent_tokens = sum(t for t, _ in self._recent)
        recent_seconds = sum(s for _, s in self._recent)
        model_tflops = tgs * self._model_flops / 1e12
        return Speed(
            tgs=tgs,
            real_tgs=labelled_tokens / self._world_size / seconds,
            last_tgs_10=self._window10.update(tokens, seconds) / self._world_size,
            last_tgs_50=self._window50.update(tokens, seconds) / self._world_size,
            tgs_all=self._tokens / self._world_size / (self._clock() - self._began),
            tgs_avg=self._sum_tgs / self._steps,
            tgs_sma=recent_tokens / self._world_size / recent_seconds,
            tflops=tgs * self._benchmark_flops / 1e12,
            model_tflops=model_tflops,
            mfu=None if self._peak_flops is None else model_tflops * 1e12 / self._peak_flops,
        )


class _Window:
    """Tokens per second of the last complete window of ``length`` steps; 0 before there is one."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0
        self._value = 0.0

    def update(self, tokens: int, seconds: float) -> float:
        """Count one step and return the figures after it."""
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds
        if self._steps == self._length:
            self._value = self._tokens / self._seconds
            self._steps, self._tokens, self._seconds = 0, 0, 0.0
        return self._value
