"""A run directory, checked against itself."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from portmoe.result import Result
from portmoe.verify.evidence import chain
from portmoe.verify.evidence.checkpoints import check_checkpoints
from portmoe.verify.evidence.data import check_batches
from portmoe.verify.evidence.directory import Directory, read_directory
from portmoe.verify.evidence.steps import check_steps
from portmoe.verify.replay.replay import Replay

PARTS = ("files", "chain", "steps", "data", "checkpoints", "replay")
MOST_REPLAYED = 4  # checkpoints, spread over the run


@dataclass(frozen=True)
class Verification:
    """What came of it.

    Attributes:
        results: in the order of ``PARTS``.
        replay: of some of its steps, where one was asked for.
    """

    path: Path
    results: list[Result] = field(default_factory=list)
    replay: Replay | None = None

    @property
    def failed(self) -> list[Result]:
        """What does not fit."""
        return [result for result in self.results if result.status == "fail"]

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts that a run has written it."""
        return not self.failed


def verify(path: Path) -> Verification:
    """Check ``path`` without computing a step.

    Raises:
        ConfigError: it is no run directory.
    """
    return Verification(path, list(_results(read_directory(path))))


def _results(directory: Directory) -> Iterator[Result]:
    yield from directory.results
    of_chain: list[Result] = []
    walked = chain.walk(directory, of_chain)
    yield from of_chain
    yield from chain.check_files(directory, walked)
    yield from chain.check_lines(directory, walked)
    yield from check_steps(directory, walked)
    yield from check_batches(directory, walked)
    yield from check_checkpoints(directory, walked)


def spread(starts: Mapping[int, int], most: int = MOST_REPLAYED) -> dict[int, int]:
    """At most ``most`` of the checkpoints, the first and the last among them."""
    steps = sorted(starts)
    if len(steps) <= most:
        return dict(starts)
    chosen = {steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)}
    return {step: starts[step] for step in sorted(chosen)}
