"""Everything ``portmoe validate`` checks, in order."""

import importlib.metadata
from collections.abc import Callable, Collection, Sequence

import torch

from portmoe.accelerator import Accelerator, get_accelerator
from portmoe.accelerator.interface import set_unset
from portmoe.accelerator.probing import describe
from portmoe.ops import OPERATIONS
from portmoe.ops.operation import Operation
from portmoe.record.origin import of_report
from portmoe.result import Result
from portmoe.verify.backend.cases import SHAPES
from portmoe.verify.backend.collectives import check_collectives
from portmoe.verify.backend.conformance import check_operation
from portmoe.verify.backend.pool import check_memory
from portmoe.verify.backend.report import Report
from portmoe.verify.runs.training_run import check_training

# Of the shapes in ``cases``: a static buffer, and a dropless layer, which implementations tell apart.
QUICK = ("plain", "few tokens, many experts")
LEFT_OUT = ("collectives", "training")  # by a quick validation: they start processes


def validate(
    backend: str, seed: int, timeout: float, progress: Callable[[str], None], quick: bool = False
) -> Report:
    """Check operations, collectives, memory and a training run of the backend called ``backend``.

    Args:
        seed: the samples depend on it.
        quick: few shapes, in this process alone: less than a minute.
        timeout: seconds the collectives, and then the training run, may take.
        progress: is told what comes next.

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
    report.provenance = of_report(accelerator.device.probe().facts, seed)
    report.checks += check_operations(accelerator, device, seed, progress, QUICK if quick else SHAPES)
    progress("memory")
    report.checks += check_memory(accelerator, device)
    if quick:
        report.checks += [
            Result("skip", "checked", "not with --quick", part=part, subject=part) for part in LEFT_OUT
        ]
        return report
    progress("collectives")
    report.checks += check_collectives(accelerator.name, accelerator, timeout)
    progress("training run")
    checks, report.curves = check_training(accelerator.name, timeout)
    report.checks += checks
    return report


def check_operations(
    accelerator: Accelerator,
    device: torch.device,
    seed: int,
    progress: Callable[[str], None],
    shapes: Collection[str] = SHAPES,
) -> list[Result]:
    """Conformance of every operation and every implementation the backend offers."""
    offered = accelerator.ops.implementations()
    checks: list[Result] = [
        Result("fail", "known", f"{i.op!r} is no operation", part="operations", subject=f"{i.op}.{i.name}")
        for i in offered
        if i.op not in OPERATIONS
    ]
    for name, operation in OPERATIONS.items():
        progress(name)
        mine = [i for i in offered if i.op == name]
        checks += _checked(operation, mine, device, seed, shapes)
    return checks


def _checked(
    operation: Operation, mine: Sequence, device: torch.device, seed: int, shapes: Collection[str]
) -> list[Result]:
    try:
        return list(check_operation(operation, mine, device, seed, shapes=shapes))
    except Exception as error:  # the device itself gave up: the other operations are still worth a try
        return [Result("fail", "can be checked", describe(error), part="operations", subject=operation.name)]
