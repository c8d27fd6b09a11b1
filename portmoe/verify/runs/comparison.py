"""Two runs of one config, on two backends or layouts: are they the same run?"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portmoe.config import Config
from portmoe.config.read import load_config
from portmoe.data.fingerprint import described
from portmoe.errors import ConfigError
from portmoe.record.run_directory import CONFIG, DATA, first_difference
from portmoe.record.writers import METRICS, read_metrics
from portmoe.verify.runs.curves import (
    LAYER_NORM,
    Distance,
    LossFigures,
    distance,
    group_norms,
    layer_norms,
    loss_figures,
)
from portmoe.verify.runs.thresholds import Thresholds, thresholds_of


@dataclass(frozen=True)
class Run:
    """One run directory, read."""

    path: Path
    config: Config
    backend: str  # "unknown" where environment.json is missing
    ranks: int
    steps: list[dict[str, Any]]
    data: Mapping[str, Any] | None = None  # what it was trained on; older runs do not say

    @property
    def name(self) -> str:
        """The run as reports name it: where it lies and what made it."""
        return f"{self.path} ({self.backend}, {self.ranks} rank{'s' if self.ranks != 1 else ''})"


@dataclass(frozen=True)
class Judged:
    """A distance, the band it must keep, and the first step outside, counted as in the runs."""

    distance: Distance
    band: float
    left_at: int | None

    @property
    def passed(self) -> bool:
        return self.left_at is None


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common.

    Attributes:
        loss: the benchmark's figures, over all common steps.
        quantities: loss, auxiliary loss, dropped tokens and gradient norms, judged over the first common
            steps, as many as ``thresholds`` says.
        notes: what could not be compared.
    """

    first: Run
    second: Run
    steps: list[int]
    loss: LossFigures
    quantities: list[Judged]
    thresholds: Thresholds
    notes: list[str]

    @property
    def passed(self) -> bool:
        return all(judged.passed for judged in self.quantities)

    @property
    def left_at(self) -> int | None:
        """The first step at which any quantity leaves its band."""
        return min((j.left_at for j in self.quantities if j.left_at is not None), default=None)


    @property
    def loss_lost(self) -> bool:
        """Whether both runs are without a loss where the losses first leave their band."""
        loss = self.quantities[0]
        return loss.left_at is not None and math.isnan(loss.distance.relative[self.steps.index(loss.left_at)])


def read_run(path: Path) -> Run:
    """A run directory, finished or not.

    Raises:
        ConfigError: it holds no run, or none that has made a step.
    """
    for name in (CONFIG, METRICS):
        if not (path / name).is_file():
            raise ConfigError(
                f"{str(path)!r} has no {name}; give the directory of a run, as `portmoe train` left it"
            )
    steps = list(read_metrics(path / METRICS))
    if not steps:
        raise ConfigError(f"{str(path / METRICS)!r} holds no complete step; let the run make some")
    try:
        environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = {}
    return Run(
        path,
        load_config(path / CONFIG),
        environment.get("backend", "unknown"),
        environment.get("ranks", 1),
        steps,
        environment.get("data"),
    )


def compare(first: Run, second: Run) -> Comparison:
    """Compare over the steps both runs have.

    Raises:
        ConfigError: the configs differ in mathematics, or the runs have no step in common.
    """
    difference = first_difference(first.config, second.config, first.data, second.data)
    if difference and difference[0] == DATA:
        raise ConfigError(
            f"the runs were trained on other data: {described(difference[1])} in {str(first.path)!r} and "
            f"{described(difference[2])} in {str(second.path)!r}; compare runs of one config on the same data"
        )
    if difference:
        key, here, there = difference
        raise ConfigError(
            f"the runs differ in mathematics: {key}={here!r} in {str(first.path)!r} and {there!r} in "
            f"{str(second.path)!r}; compare runs of one config"
        )
    common = sorted({s["step"] for s in first.steps} & {s["step"] for s in second.steps})
    if not common:
        raise ConfigError(f"{str(first.path)!r} and {str(second.path)!r} have no step in common")
    a, b = (_at(run.steps, common) for run in (first, second))
    limits = thresholds_of(first.config.model.dtype)
    notes = []
    tokens = [run[0]["num_consumed_tokens"] for run in (a, b)]
    if tokens[0] != tokens[1]:
        raise ConfigError(
            f"the runs have another global batch: {tokens[0]} and {tokens[1]} tokens after step {common[0]}; "
            "set data.global_batch_size alike in both"
        )
    if not all(any(key.startswith(LAYER_NORM) for key in run[0]) for run in (a, b)):
        notes.append("gradient norms by layer: not recorded in both runs")
    notes += [
        f"{what} are judged over the first {most} of {len(common)} common steps, and shown for all"
        for what, most in (("losses", limits.loss_steps), ("norms and drops", limits.norm_steps))
        if len(common) > most
    ]
    loss = distance("loss", _column(a, "loss"), _column(b, "loss"))
    moe_loss = distance("auxiliary loss", _column(a, "moe_loss"), _column(b, "moe_loss"))
    judged = [_judge(found, limits.loss, common, limits.loss_steps) for found in (loss, moe_loss)]
    judged += _validation(a, b, common, limits, notes)
    # Where both runs begin they still have the same weights.
    begin = common[0] == first.steps[0]["step"] == second.steps[0]["step"]
    bands = (limits.norm, limits.first_norm if begin else None)
    layer_bands = (limits.layer_norm, limits.first_layer_norm if begin else None)
    others = [
        *((found, limits.dropped, None) for found in _dropped(a, b)),
        *((found, *bands) for found in group_norms(a, b)),
        *((found, *layer_bands) for found in layer_norms(a, b)),
    ]
    judged += [_judge(found, band, common, limits.norm_steps, at_first) for found, band, at_first in others]
    if begin and limits.first_norm < limits.norm:
        notes.append(
            f"in the first step, where the weights are still the same, norms may deviate by "
            f"{limits.first_norm:.0e}, those of layers by {limits.first_layer_norm:.0e}"
        )
    return Comparison(first, second, common, loss_figures(loss), judged, limits, notes)


def _judge(
    found: Distance, band: float, steps: Sequence[int], most: int, first: float | None = None
) -> Judged:
    left = found.leaves(band, first)
    return Judged(found, band, None if left is None or left >= most else steps[left])


def _at(records: Sequence[dict[str, Any]], steps: Sequence[int]) -> list[dict[str, Any]]:
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in steps]


def _column(records: Sequence[dict[str, Any]], key: str) -> list[float | None]:
    return [record[key] for record in records]


def _dropped(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> Iterator[Distance]:
    """Rates are compared by their difference: near zero a quotient would say nothing. A dense model has none."""
    rates = [_column(run, "dropped_token_rate") for run in (a, b)]
    if any(rate is not None for run in rates for rate in run):
        pairs = zip(*rates, strict=True)
        yield Distance("dropped tokens, rate", *rates, [_difference(x, y) for x, y in pairs])


def _difference(x: float | None, y: float | None) -> float:
    if x is None or y is None:
        return math.nan if x is y else math.inf
    return abs(y - x)


def _validation(
    a: Sequence[dict[str, Any]],
    b: Sequence[dict[str, Any]],
    common: Sequence[int],
    limits: Thresholds,
    notes: list[str],
) -> Iterator[Judged]:
    """The loss of the validations that both runs made after the same steps."""
    made = [{i for i, record in enumerate(run) if "valid_loss" in record} for run in (a, b)]
    both = sorted(made[0] & made[1])
    unlike = [i for i in both if ("valid_tokens" in a[i]) != ("valid_tokens" in b[i])]
    if unlike:
        both = sorted(set(both) - set(unlike))
        notes.append(
            f"validations: {len(unlike)} not compared: one run is of a version that read only the first packs "
            "of the validation data"
        )
    if made[0] != made[1]:
        notes.append(
            f"validations: {len(made[0])} and {len(made[1])} in the common steps, {len(both)} after the same ones"
        )
    if both:
        losses = (_column([run[i] for i in both], "valid_loss") for run in (a, b))
        yield _judge(
            distance("validation loss", *losses), limits.loss, [common[i] for i in both], len(both)
        )
