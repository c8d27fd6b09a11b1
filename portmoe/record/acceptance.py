"""The benchmark's acceptance on its dummy data: the loss stays below a limit from a step on."""

from collections.abc import Sequence
from dataclasses import dataclass

from portmoe.config import Config
from portmoe.config.names import BENCHMARK
from portmoe.config.read import load_config

FIRST_STEP = 50  # counted from 0
LIMIT = 0.325
RULE = f"loss < {LIMIT} at every step from {FIRST_STEP} on"


@dataclass(frozen=True)
class Verdict:
    """Whether a run is accepted; None: it was too short for it."""

    accepted: bool | None
    text: str


def judge(losses: Sequence[float | None]) -> Verdict:
    """Judge the losses of the steps from ``FIRST_STEP`` on; None stands for one that was not finite."""
    if not losses:
        return Verdict(None, f"not reached ({RULE}): more than {FIRST_STEP} steps are needed")
    failed = sum(loss is None or not loss < LIMIT for loss in losses)
    if failed:
        return Verdict(False, f"FAILED ({RULE}): at {failed} of {len(losses)} steps")
    return Verdict(True, f"passed ({RULE}): largest {max(losses):.4f} of {len(losses)} steps")


def applies(config: Config) -> bool:
    """Whether the run is one that the benchmark judges."""
    return config.data.train_folder is None


def of_the_benchmark(config: Config) -> bool:
    """Whether the model is the benchmark's own, whose runs are filed."""
    return config.architecture == load_config(BENCHMARK).architecture


def out_of_reach(config: Config) -> str | None:
    """A line that says so where a run has too few steps to be accepted."""
    steps = config.data.total_steps
    if not applies(config) or steps is None or steps > FIRST_STEP:  # None: the data will say
        return None
    return (
        f"acceptance: cannot be reached in {steps} steps ({RULE}, counted from 0); set data.total_steps "
        f"to more than {FIRST_STEP}"
    )
