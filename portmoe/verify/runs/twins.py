"""How far two right runs part, measured by twins: the same run from weights one unit in their last place away.

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
from portmoe.verify.runs.quantities import Kind, Quantity, Records, quantities
from portmoe.verify.runs.recorded import Run, read_run

# How many times the twins' spread so far two right runs may part: other implementations round in every
# operation of every step, twins once.
FACTOR = 10.0
# The spread, of the kinds that have one, at which two runs are strangers.
STRANGERS: Mapping[Kind, float] = {"loss": 0.02, "norm": 0.1, "layer": 0.1, "dropped": 0.01, "load": 0.01}


@dataclass(frozen=True)
class Twins:
    """Twins of one of the runs that are compared, over the steps all have.

    Attributes:
        runs: the twins, and the run they are of where it is known to be right as they are: made alike.
        records: of each, at the steps compared.
    """

    runs: Sequence[Run]
    records: Sequence[Records]

    @cached_property
    def pairs(self) -> list[dict[str, Quantity]]:
        """Every two of them, by quantity."""
        return [{q.label: q for q in quantities(a, b)} for a, b in combinations(self.records, 2)]

    def spread(self, label: str) -> list[float]:
        """The largest deviation between any two, by step; nan where none has a number."""
        found = [pair[label].distance.relative for pair in self.pairs if label in pair]
        return [
            max((r for r in step if not math.isnan(r)), default=math.nan) for step in zip(*found, strict=True)
        ]

    def reached(self, label: str) -> list[float]:
        """The largest spread up to each step: what rounding has grown to by then."""
        return list(accumulate((0.0 if math.isnan(s) else s for s in self.spread(label)), max))

    def values(self, label: str) -> Sequence[float | None]:
        """The quantity in the last of them, by step; nothing where it was not recorded."""
        return self.pairs[-1][label].distance.second if label in self.pairs[-1] else ()

    def strangers_at(self, kind: Kind, label: str) -> int:
        """Index of the first step at which two of them have nothing in common; the number of steps if never."""
        reached = self.reached(label)
        return next((i for i, r in enumerate(reached) if r >= STRANGERS[kind]), len(reached))

    @property
    def growth(self) -> float | None:
        """By what factor the spread of the loss grows in a step; None where it never shows or never grows."""
        reached, until = self.reached("loss"), self.strangers_at("loss", "loss")
        begin = next((i for i, r in enumerate(reached) if r > 0), len(reached))
        last = min(until, len(reached) - 1)
        return (reached[last] / reached[begin]) ** (1 / (last - begin)) if last > begin else None


def twins_of(
    first: Run, second: Run, given: Sequence[Path], steps: list[int], notes: list[str]
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
    return Twins(together, [run.at(steps) for run in together])


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
