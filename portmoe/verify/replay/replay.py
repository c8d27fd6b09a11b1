"""The outcome of a replay: every recomputed step beside its record."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from portmoe.result import Result
from portmoe.verify.replay.bands import bands_of
from portmoe.verify.replay.judge import judge
from portmoe.verify.replay.recorded import Recorded
from portmoe.verify.runs.recorded import Run, read_run

RECORD = "replayed"  # below --out: the run directory of the steps made again


@dataclass(frozen=True)
class Replay:
    """What came of a replay.

    Attributes:
        recorded: the run, as it recorded itself.
        made: its steps as they were made again.
        results: in the order of the steps, within one in the order in which a step makes its figures.
    """

    recorded: Recorded
    made: Run
    results: list[Result]

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing differs."""
        judged = [result.status for result in self.results]
        return "fail" not in judged and "pass" in judged

    @property
    def first(self) -> Result | None:
        """What differs first."""
        return next((result for result in self.results if result.status == "fail"), None)


def replay_of(recorded: Recorded, out: Path) -> Replay:
    """Judge what ``recompute`` has left in ``out``."""
    made = read_run(out / RECORD)
    return Replay(recorded, made, list(_results(recorded, made)))


def _results(recorded: Recorded, made: Run) -> Iterator[Result]:
    dtypes = {recorded.run.config.model.dtype, made.config.model.dtype}
    bands, scaled_alike = bands_of(dtypes), len(dtypes) == 1 or "float16" not in dtypes
    before = {record["step"]: record for record in recorded.run.steps}
    after = {record["step"]: record for record in made.steps}
    for step in recorded.starts.values():
        if step in after:
            yield from judge(before[step], after[step], bands, scaled_alike)
        else:
            yield Result(
                "fail", "completes", "the step was not made", subject=f"step {step}", part="schedule"
            )
