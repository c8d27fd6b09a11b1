"""Two runs of one config, on two backends or layouts: are they the same run?

Steps are held together one by one as far as rounding lets them: as far as twins show, or, without any, as
long as no weight can have moved far. Beyond, twins show what a distribution of right runs looks like.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from portmoe.errors import ConfigError
from portmoe.record import acceptance
from portmoe.training.schedule import learning_rate
from portmoe.verify.runs.curves import LAYER_NORM, Distance, LossFigures, distance, loss_figures
from portmoe.verify.runs.distribution import Figure, figures
from portmoe.verify.runs.quantities import Quantity, Records, column, quantities
from portmoe.verify.runs.recorded import Run, read_run, require_same_run
from portmoe.verify.runs.thresholds import FAMILIES, Kind, Thresholds, thresholds_of
from portmoe.verify.runs.twins import Twins, twins_of

__all__ = ["Comparison", "Judged", "Run", "compare", "read_run"]

UNJUDGED = sys.float_info.max  # only a number that one run lacks is beyond it


@dataclass(frozen=True)
class Judged:
    """A distance, the bands it must keep step by step, and what is judged of its later steps.

    Attributes:
        bands: by step, as far as steps are judged one by one.
        spread: of the twins, by step; nothing without twins.
        left_at: the first step outside its band, counted as in the runs.
        later: the figures of the steps after those.
    """

    distance: Distance
    bands: Sequence[float]
    left_at: int | None
    spread: Sequence[float] = ()
    later: Sequence[Figure] = ()

    @property
    def band(self) -> float:
        """The narrowest band after the first step, which may have one of its own."""
        return min(self.bands[1:] or self.bands or [math.nan])

    @property
    def largest(self) -> float:
        """The largest deviation among the steps judged one by one; nan where there is none."""
        judged = self.distance.relative[: len(self.bands)]
        return max((r for r in judged if not math.isnan(r)), default=math.nan)

    @property
    def share(self) -> float:
        """The largest share that was needed of what is allowed, of a step's band or of a later figure."""
        steps = zip(self.distance.relative, self.bands, strict=False)
        shares = [r / band for r, band in steps if not math.isnan(r)]
        return max([*shares, *(f.value / f.allowed for f in self.later)], default=math.nan)

    @property
    def passed(self) -> bool:
        return self.left_at is None and all(figure.passed for figure in self.later)


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common.

    Attributes:
        loss: the benchmark's figures, over all common steps.
        quantities: loss, auxiliary loss, dropped tokens, gradient norms and the experts' load.
        until: how many steps the losses are judged one by one.
        twins: what shows how far rounding carries; None without any.
        accepted: whether each run meets the benchmark's acceptance; None where it does not apply.
        notes: what could not be compared.
    """

    first: Run
    second: Run
    steps: list[int]
    loss: LossFigures
    quantities: list[Judged]
    thresholds: Thresholds
    notes: list[str]
    until: int = 0
    twins: Twins | None = None
    accepted: tuple[bool | None, bool | None] = (None, None)
    accepted_twins: list[bool | None] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(judged.passed for judged in self.quantities) and not self.acceptance_differs

    @property
    def left_at(self) -> int | None:
        """The first step at which any quantity leaves its band."""
        return min((j.left_at for j in self.quantities if j.left_at is not None), default=None)

    @property
    def loss_lost(self) -> bool:
        """Whether both runs are without a loss where the losses first leave their band."""
        loss = self.quantities[0]
        return loss.left_at is not None and math.isnan(loss.distance.relative[self.steps.index(loss.left_at)])

    @property
    def acceptance_differs(self) -> bool:
        """One run meets the benchmark's acceptance, the other does not, and every twin does."""
        return set(self.accepted) == {True, False} and False not in self.accepted_twins

    @property
    def identical(self) -> bool:
        """Whether no figure differs in any step, so that there is no rounding to judge."""
        return all(apart == 0 for j in self.quantities for apart in j.distance.relative)

    @property
    def judged_later(self) -> bool:
        """Whether steps beyond those judged one by one were judged too."""
        return any(j.later for j in self.quantities)


def compare(first: Run, second: Run, twins: Sequence[Path] = ()) -> Comparison:
    """Compare over the steps both runs have.

    Args:
        twins: directories of twins of one of the two; without any, those that lie beside it are taken.

    Raises:
        ConfigError: the configs differ in mathematics, the runs have no step in common, or a twin given is
            none.
    """
    require_same_run(first, second)
    common = sorted({s["step"] for s in first.steps} & {s["step"] for s in second.steps})
    if not common:
        raise ConfigError(f"{str(first.path)!r} and {str(second.path)!r} have no step in common")
    a, b = first.at(common), second.at(common)
    _require_same_batch(a, b)
    limits = thresholds_of(first.config.model.dtype)
    notes: list[str] = []
    if not all(any(key.startswith(LAYER_NORM) for key in run[0]) for run in (a, b)):
        notes.append("gradient norms by layer: not recorded in both runs")
    measured = twins_of(first, second, twins, common, limits, notes)
    # Where both runs begin they still have the same weights.
    begin = common[0] == first.steps[0]["step"] == second.steps[0]["step"]
    judge = _Judge(common, limits, measured, _moved(first, common, begin), begin)
    if measured is None and judge.safe("norm") < min(judge.safe("loss"), len(common)):
        notes.append(
            f"norms and drops are judged over the first {judge.safe('norm')} of {len(common)} common steps"
        )
    found = list(quantities(a, b))
    judged = [judge.of(quantity) for quantity in found]
    judged[2:2] = _validation(a, b, judge, judged[0].bands, notes)
    if begin and limits.first_norm < limits.norm:
        notes.append(
            f"in the first step, where the weights are still the same, norms may deviate by "
            f"{limits.first_norm:.0e}, those of layers by {limits.first_layer_norm:.0e}"
        )
    return Comparison(
        first,
        second,
        common,
        loss_figures(found[0].distance),
        judged,
        limits,
        notes,
        until=len(judged[0].bands),
        twins=measured,
        accepted=(_accepted(first, a), _accepted(second, b)),
        accepted_twins=[_accepted(r, steps) for r, steps in zip(measured.runs, measured.records, strict=True)]
        if measured
        else [],
    )


@dataclass(frozen=True)
class _Judge:
    """Judges quantities over the same steps.

    Attributes:
        moved: how far a weight can have moved before each step.
        begin: the runs begin with the first of the steps, from the same weights.
    """

    steps: Sequence[int]
    limits: Thresholds
    twins: Twins | None
    moved: Sequence[float]
    begin: bool

    def of(self, quantity: Quantity) -> Judged:
        kind, found, twins = quantity.kind, quantity.distance, self.twins
        bands = [self.limits.band(kind)] * len(self.steps)
        if self.begin:
            bands[0] = self.limits.first_band(kind)
        safe = self.safe(kind)
        if twins is None or not any(quantity.label in pair for pair in twins.pairs):
            bands = bands[:safe]
            return Judged(found, bands, self._left(found, bands))
        grown = twins.grown[FAMILIES[kind]]
        followed = [band * max(1.0, twins.factor * by) for band, by in zip(bands, grown, strict=True)]
        bands = [*bands[:safe], *followed[safe:]]
        far = (i for i, band in enumerate(bands) if i >= safe and band >= self.limits.strangers(kind))
        bands = bands[: next(far, len(bands))]
        later = figures(quantity, twins, len(bands))
        return Judged(found, bands, self._left(found, bands), twins.spread(quantity.label), later)

    def safe(self, kind: Kind) -> int:
        """For how many steps rounding cannot have grown: no weight can have moved far."""
        losses = FAMILIES[kind] == "losses"
        most = self.limits.loss_steps if losses else self.limits.norm_steps
        moves = self.limits.loss_moves if losses else self.limits.norm_moves
        return min(most, sum(moved <= moves for moved in self.moved))

    def _left(self, found: Distance, bands: Sequence[float]) -> int | None:
        left = found.leaves([*bands, *[UNJUDGED] * (len(found.relative) - len(bands))])
        return None if left is None else self.steps[left]


def _moved(run: Run, steps: Sequence[int], begin: bool) -> list[float]:
    """For each step the sum of the learning rates before it, from where both runs had the same weights."""
    first = steps[0] if begin else 0
    sums = list(
        accumulate((learning_rate(run.config, step) for step in range(first, steps[-1])), initial=0.0)
    )
    return [sums[step - first] for step in steps]


def _require_same_batch(a: Records, b: Records) -> None:
    tokens = [run[0]["num_consumed_tokens"] for run in (a, b)]
    if tokens[0] != tokens[1]:
        raise ConfigError(
            f"the runs have another global batch: {tokens[0]} and {tokens[1]} tokens after step "
            f"{a[0]['step']}; set data.global_batch_size alike in both"
        )


def _accepted(run: Run, records: Records) -> bool | None:
    """Whether a run meets the benchmark's acceptance; None on other data, and where it is too short."""
    late = [record["loss"] for record in records if record["step"] >= acceptance.FIRST_STEP]
    return acceptance.judge(late).accepted if run.on_dummy_data else None


def _validation(
    a: Records, b: Records, judge: _Judge, of_each_step: Sequence[float], notes: list[str]
) -> Iterator[Judged]:
    """The loss of the validations that both runs made after the same steps.

    Args:
        of_each_step: the bands of the loss.
    """
    made = [{i for i, record in enumerate(run) if "valid_loss" in record} for run in (a, b)]
    both = sorted(made[0] & made[1])
    unlike = [i for i in both if ("valid_tokens" in a[i]) != ("valid_tokens" in b[i])]
    if unlike:
        both = sorted(set(both) - set(unlike))
        notes.append(
            f"validations: {len(unlike)} not compared: one run is of a version that read only the first "
            "packs of the validation data"
        )
    if made[0] != made[1]:
        notes.append(
            f"validations: {len(made[0])} and {len(made[1])} in the common steps, {len(both)} after the "
            "same ones"
        )
    if both:
        losses = (column([run[i] for i in both], "valid_loss") for run in (a, b))
        found = distance("validation loss", *losses)
        bands = [max(judge.limits.loss, of_each_step[i]) for i in both if i < len(of_each_step)]
        left = found.leaves([*bands, *[UNJUDGED] * (len(both) - len(bands))])
        yield Judged(found, bands, None if left is None else judge.steps[both[left]])
