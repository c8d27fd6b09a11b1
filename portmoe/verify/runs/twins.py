"""How far two right runs part, measured by twins: the same run from weights one unit in the last place away.

Rounding grows in training: what differs by 1e-7 in one step differs by several times that in the next. Twins
show how fast, and from which step on two right runs have nothing in common but their distribution.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, combinations
from pathlib import Path

from portmoe.config import Config
from portmoe.errors import ConfigError
from portmoe.record.run_directory import first_difference
from portmoe.verify.runs.quantities import Quantity, Records, quantities
from portmoe.verify.runs.recorded import Run, read_run
from portmoe.verify.runs.thresholds import FAMILIES, STRANGERS, Family, Thresholds

# How many times as far as the twins two right runs may part, and how many times as much as the twins' figures
# of their distributions may differ: by how many runs show it, as few show little of what chance does.
FACTORS, MARGINS = {2: 300.0, 3: 100.0, 4: 30.0}, {3: 8.0, 4: 5.0}
ONSET = 0.02  # of a norm's band: what only a choice of experts that fell the other way has made so early


@dataclass(frozen=True)
class Twins:
    """Twins of one of the runs that are compared, over the steps all have.

    Attributes:
        runs: the twins, and the run they are of where it is known to be right as they are: made alike.
        records: of each, at the steps compared.
        limits: the bands.
    """

    runs: Sequence[Run]
    records: Sequence[Records]
    limits: Thresholds

    @property
    def factor(self) -> float:
        """How many times the twins' spread a band is."""
        return FACTORS[min(len(self.runs), max(FACTORS))]

    @property
    def margin(self) -> float | None:
        """How many times the twins' figures two distributions may differ by; None: too few to know one."""
        return MARGINS.get(min(len(self.runs), max(MARGINS)))

    @cached_property
    def pairs(self) -> list[dict[str, Quantity]]:
        """Every two of them, by quantity."""
        return [{q.label: q for q in quantities(a, b)} for a, b in combinations(self.records, 2)]

    @cached_property
    def grown(self) -> dict[Family, list[float]]:
        """How far right runs may have come apart by each step: families → deviations in bands.

        When rounding first tips a choice of experts is chance, and may be earlier than between any two twins;
        how it grows from there is the run's. So each pair counts twice: as it is, and as if it had begun
        to part in the first step.
        """
        grown: dict[Family, list[float]] = {}
        for pair in self.pairs:
            for family, apart in self._in_bands(pair).items():
                onset = _onset(self._in_bands(pair).get("norms", apart))
                earlier = [*apart[onset:], *[apart[-1]] * onset]
                so_far = grown.get(family, [0.0] * len(apart))
                grown[family] = [max(step) for step in zip(so_far, apart, earlier, strict=True)]
        return grown

    def _in_bands(self, pair: Mapping[str, Quantity]) -> dict[Family, list[float]]:
        """The largest deviation of a family's quantities up to each step, in bands."""
        apart: dict[Family, list[float]] = {}
        for quantity in pair.values():
            family, band = FAMILIES[quantity.kind], self.limits.band(quantity.kind)
            relative = [0.0 if math.isnan(r) else r / band for r in quantity.distance.relative]
            apart[family] = list(map(max, apart.get(family, relative), relative))
        return {family: list(accumulate(deviations, max)) for family, deviations in apart.items()}

    def spread(self, label: str) -> list[float]:
        """The largest deviation between any two, by step; nan where none has a number."""
        found = [pair[label].distance.relative for pair in self.pairs if label in pair]
        by_step = zip(*found, strict=True)
        return [max((r for r in step if not math.isnan(r)), default=math.nan) for step in by_step]

    def values(self, label: str) -> Sequence[float | None]:
        """The quantity in the last of them, by step; nothing where it was not recorded."""
        return self.pairs[-1][label].distance.second if label in self.pairs[-1] else ()

    @property
    def growth(self) -> float | None:
        """By what factor the norms' spread grows in a step, from its onset until it is as large as they are.

        None where it never shows.
        """
        apart = self.grown.get("norms", [])
        last = next(
            (i for i, r in enumerate(apart) if r * self.limits.norm >= STRANGERS["norms"]), len(apart) - 1
        )
        return (apart[last] / apart[0]) ** (1 / last) if last > 0 and apart[0] >= ONSET else None


def _onset(norms: Sequence[float]) -> int:
    """Index of the first step at which a choice of experts differs; 0 where none does."""
    return next((i for i, apart in enumerate(norms) if apart >= ONSET), 0)


def twins_of(
    first: Run,
    second: Run,
    given: Sequence[Path],
    steps: list[int],
    limits: Thresholds,
    notes: list[str],
) -> Twins | None:
    """The twins to judge two runs by: those given, or those that lie beside one of the two.

    Args:
        steps: those compared; a twin that lacks some is of no use.
        notes: takes why twins that lie there are passed over.

    Raises:
        ConfigError: one that was given is no twin of these runs.
    """
    found: list[Run] = []
    for path in given or _beside(first, second):
        run = read_run(path)
        problem = _no_twin(run, first, second, steps)
        if problem is None:
            found.append(run)
        elif given:
            raise ConfigError(f"{str(path)!r} is no twin of these runs: {problem}")
        else:
            notes.append(f"{path} lies beside them and is not taken as a twin: {problem}")
    if not found:
        return None
    # A run made as the twins were is one of them; of the two compared the other one may be wrong.
    alike = [run for run in (first, second) if _made(run) == _made(found[0])]
    together = [*alike[:1], *found]
    if len(together) < 2:
        notes.append("one twin made in another way than both runs shows no spread: train a second one")
        return None
    return Twins(together, [run.at(steps) for run in together], limits)


def _beside(first: Run, second: Run) -> Iterator[Path]:
    for run in (first, second):
        found = sorted(run.path.parent.glob(f"{run.path.name}-twin*"))
        if found:
            yield from found
            return


def _no_twin(run: Run, first: Run, second: Run, steps: Sequence[int]) -> str | None:
    """Why a run is no twin of two others; None for one that is."""
    if not run.config.run.twin:
        return "run.twin=0, so it was trained from the same weights; portmoe train --twin N makes a twin"
    difference = first_difference(first.config, original(run.config), first.data, run.data)
    if difference:
        return f"{difference[0]} is {difference[2]!r} there, and {difference[1]!r} in {str(first.path)!r}"
    missing = set(steps) - {record["step"] for record in run.steps}
    if missing:
        return f"it has no step {min(missing)}; train it as far as the runs"
    return None


def original(config: Config) -> Config:
    """The config of the run that a twin is of."""
    return config.model_copy(update={"run": config.run.model_copy(update={"twin": 0})})


def _made(run: Run) -> tuple[str, int]:
    return run.backend, run.ranks
