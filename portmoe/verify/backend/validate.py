"""Everything ``portmoe validate`` checks, in groups: each operation, memory, collectives, a training run."""

import importlib.metadata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from portmoe.accelerator import Accelerator, get_accelerator
from portmoe.accelerator.interface import set_unset
from portmoe.accelerator.probing import describe
from portmoe.errors import ConfigError
from portmoe.ops import OPERATIONS
from portmoe.ops.operation import Implementation, Operation
from portmoe.record.origin import of_report
from portmoe.result import Result
from portmoe.verify.backend.cases import DTYPES, SHAPES
from portmoe.verify.backend.collectives import check_collectives
from portmoe.verify.backend.conformance import check_operation
from portmoe.verify.backend.pool import check_memory
from portmoe.verify.backend.progress import Progress, Show, Tell, counted_warnings
from portmoe.verify.backend.report import LEFT_OUT, Curve, Report
from portmoe.verify.runs.training_run import check_training

# Of the shapes in ``cases``: a static buffer, and a dropless layer, which implementations tell apart.
QUICK = ("plain", "few tokens, many experts")
PROCESSES = ("collectives", "training")  # left out by a quick validation: they start processes
GROUPS = (*OPERATIONS, "memory", *PROCESSES)


@dataclass(frozen=True)
class Selection:
    """What of a backend is checked.

    Attributes:
        only: of ``GROUPS``; empty: all.
        dtypes: that operations are tried with.
        quick: few shapes, in this process alone: less than a minute.
        seed: the samples depend on it.
        timeout: seconds the collectives, and then the training run, may take.
    """

    only: Collection[str] = ()
    dtypes: Sequence[torch.dtype] = DTYPES
    quick: bool = False
    seed: int = 0
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.only if name not in GROUPS]:
            raise ConfigError(
                f"--only {unknown[0]!r} is nothing that is checked; give some of {', '.join(GROUPS)}"
            )

    def why_not(self, group: str) -> str | None:
        """Why a group is left out; None for one that is checked."""
        if self.only and group not in self.only:
            return "not with --only"
        return "not with --quick" if self.quick and group in PROCESSES else None


@dataclass(frozen=True)
class Group:
    """Checks that are told of together."""

    name: str
    checks: Callable[[], Iterator[Result]]
    part: str


def validate(
    backend: str, selection: Selection, tell: Tell, show: Show = lambda now, done, total: None
) -> Report:
    """Check operations, memory, collectives and a training run of the backend called ``backend``.

    An interrupt (Ctrl-C) ends the checks and not the report, which says what was left.

    Args:
        tell: is given a line as each group ends, and one for each failure at once.
        show: is told what runs now, and how many groups are done.

    Raises:
        ConfigError: no backend has this name.
        BackendError: it cannot be used on this machine.
    """
    accelerator = get_accelerator(backend)
    set_unset(accelerator.device.deterministic_environment())
    device = accelerator.open(0)
    report = Report(
        accelerator.name, accelerator.device.name(), {"torch": importlib.metadata.version("torch")}
    )
    report.provenance = of_report(accelerator.device.probe().facts, selection.seed)
    groups = list(_groups(accelerator, device, selection, report.curves))
    chosen = [group for group in groups if selection.why_not(group.name) is None]
    done = 0
    progress = Progress(tell, [group.name for group in chosen], show)
    report.checks += _unknown(accelerator)
    try:
        with counted_warnings() as report.warnings:
            for group in chosen:
                for check in group.checks():
                    report.checks.append(check)
                    progress.found(check)
                done += 1
                progress.end_group()
    except KeyboardInterrupt:
        report.interrupted = chosen[min(done, len(chosen) - 1)].name
        tell(f"interrupted in {report.interrupted}; the report holds what was done before")
    undone = {group.name: "interrupted" for group in chosen[done:]}
    for group in groups:
        if why := undone.get(group.name) or selection.why_not(group.name):
            report.checks.append(Result("skip", LEFT_OUT, why, part=group.part, subject=group.name))
    return report


def _unknown(accelerator: Accelerator) -> Iterator[Result]:
    for made in accelerator.ops.implementations():
        if made.op not in OPERATIONS:
            subject = f"{made.op}.{made.name}"
            yield Result("fail", "known", f"{made.op!r} is no operation", part="operations", subject=subject)


def _groups(
    accelerator: Accelerator, device: torch.device, selection: Selection, curves: list[Curve]
) -> Iterator[Group]:
    offered = accelerator.ops.implementations()
    for name, operation in OPERATIONS.items():
        mine = [made for made in offered if made.op == name]
        yield Group(name, partial(_operation, operation, mine, device, selection), "operations")
    yield Group("memory", partial(check_memory, accelerator, device), "memory")
    yield Group(
        "collectives",
        partial(check_collectives, accelerator.name, accelerator, selection.timeout),
        "collectives",
    )
    yield Group("training", partial(_training, accelerator.name, selection.timeout, curves), "training")


def _operation(
    operation: Operation, mine: Sequence[Implementation], device: torch.device, selection: Selection
) -> Iterator[Result]:
    """Conformance of every implementation the backend offers of one operation."""
    shapes = QUICK if selection.quick else SHAPES
    try:
        yield from check_operation(operation, mine, device, selection.seed, selection.dtypes, shapes)
    except Exception as error:  # the device itself gave up: the other operations are still worth a try
        yield Result("fail", "can be checked", describe(error), part="operations", subject=operation.name)


def _training(backend: str, timeout: float, curves: list[Curve]) -> Iterator[Result]:
    checks, recorded = check_training(backend, timeout)
    curves += recorded
    yield from checks
