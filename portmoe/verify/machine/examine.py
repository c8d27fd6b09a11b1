"""The child side of the survey: everything that imports torch or touches a device.

``python -m portmoe.verify.machine.examine probe ASKED NAME…`` imports torch and probes backends;
``… try NAME RANK RANKS STORE TIMEOUT`` opens a device, computes, communicates and, on rank 0, chooses.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from portmoe.accelerator.discovery import find, import_torch, load, probe_of
from portmoe.accelerator.preflight import preflight_of
from portmoe.accelerator.probing import Probe, describe
from portmoe.errors import BackendError
from portmoe.result import Result, Status
from portmoe.verify.machine.child import report

if TYPE_CHECKING:
    from portmoe.accelerator.interface import Accelerator

MOST_RANKS = 2


def probe(asked: str, names: Iterable[str]) -> None:
    """Report whether torch can be imported, what each probe finds, and how many ranks can try it out."""
    broken = import_torch(asked)
    report({"torch": asdict(broken) if broken else None})
    if broken:
        return
    for name in names:
        priority, ranks = 0, 0
        try:
            accelerator = load(name)
        except BackendError as error:
            found = Probe(present=True)  # the package is: someone wants this backend
            found.fail(str(error), "repair or uninstall the package that provides it")
        else:
            priority, found = accelerator.priority, probe_of(accelerator)
            ranks = _ranks(accelerator) if found.usable else 0
        report(
            {
                "name": name,
                "priority": priority,
                "ranks": ranks,
                "facts": found.facts,
                "problems": [asdict(problem) for problem in found.problems],
                "present": found.present,
            }
        )


def _ranks(accelerator: "Accelerator") -> int:
    """Two where each rank can have a device or where they may share one."""
    return MOST_RANKS if accelerator.device.shared else min(MOST_RANKS, accelerator.device.count())


def try_out(name: str, rank: int, ranks: int, store_file: str, timeout: timedelta) -> None:
    """Open the device as training would, and report how each trial went."""
    accelerator = load(name)
    # These need torch, which `load` imports the way the backend wants it.
    import torch.distributed as dist

    from portmoe.verify.machine import trials

    def attempt(
        check: str, trial: Callable[..., Iterable[Result]], *args: Any, fix: str, level: Status = "fail"
    ) -> None:
        report({"begins": check})
        try:
            findings = list(trial(*args))
        except Exception as error:
            findings = [Result(level, check, describe(error), fix)]
        for finding in findings:
            if rank == 0 or finding.status != "pass":
                report(asdict(finding))

    wanted = trials.wanted_environment(accelerator, preflight_of(find(name)), timeout)
    device = accelerator.open(rank)
    if rank == 0:
        attempt("memory", trials.memory, accelerator, device, fix=trials.REINSTALL, level="warn")
        for dtype in trials.ALLOWED:
            level = trials.failure_level(dtype)
            check = trials.dtype_name(dtype)
            attempt(check, trials.forward_backward, device, dtype, fix=trials.OTHER_DTYPE, level=level)

    def communicate() -> Iterable[Result]:
        accelerator.collectives.init(device, rank, ranks, timeout, dist.FileStore(store_file, ranks))
        yield from trials.collectives(accelerator, device)
        dist.destroy_process_group()

    attempt("collectives", communicate, fix=trials.CHECK_NETWORK)
    deterministic = accelerator.device.deterministic_environment()
    attempt("environment", trials.environment, wanted, deterministic, fix=trials.REINSTALL)
    if rank == 0:

        def choice() -> Iterable[Result]:
            record, findings = trials.operations(accelerator, device)
            report({"operations": record})
            return findings

        attempt("operations", choice, fix="report this to the maintainers of the backend")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "probe":
        probe(arguments[0], arguments[1:])
    else:
        backend, its_rank, of_ranks, store, seconds = arguments
        try_out(backend, int(its_rank), int(of_ranks), store, timedelta(seconds=float(seconds)))
