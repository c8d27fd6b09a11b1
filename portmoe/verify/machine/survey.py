"""All checks in order, from versions to a choice of implementations."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from portmoe.accelerator.discovery import AUTO, find, preference, registered
from portmoe.accelerator.preflight import AUTOLOAD, plugins
from portmoe.accelerator.probing import installed_version
from portmoe.result import Result, Status
from portmoe.verify.machine.child import Outcome, run_python
from portmoe.verify.machine.report import BackendReport, Report
from portmoe.verify.machine.versions import check_versions, versions

EXAMINE = ("-m", "portmoe.verify.machine.examine")
WITHOUT_PLUGINS = {AUTOLOAD: "0"}
REPAIR_TORCH = "repair torch first: see its line at the top"


def survey(asked: str, timeout: float, progress: Callable[[str], None] = lambda what: None) -> Report:
    """Check the backend called ``asked``, or all registered ones for "auto".

    Args:
        timeout: seconds one child process may take.
        progress: is told what comes next.

    Raises:
        ConfigError: no backend is called ``asked``.
        BackendError: two packages claim the name of one backend.
    """
    names = sorted(registered()) if asked == AUTO else [find(asked).name]
    report = Report(asked, versions(), check_versions())
    torch = installed_version("torch")
    problem, report.backends = _probe(names, asked, {}, timeout, progress)
    if problem is None:
        report.findings.append(Result("pass", "torch", f"{torch} imports"))
    else:
        report.findings.append(problem)
        still, report.backends = _probe(names, asked, WITHOUT_PLUGINS, timeout, progress)
        if still is None:
            text = f"{torch} itself is sound: with {AUTOLOAD}=0 it imports; the checks below ran with that"
            report.findings.append(Result("pass", "torch", text))
        for backend in report.backends:
            more = "; with it, all of the above works" if backend.can_train and backend.findings else ""
            backend.block(Result("fail", "torch", f"torch cannot be imported{more}", REPAIR_TORCH))
    report.backends.sort(key=lambda b: (not b.can_train, preference(b.priority, b.name)))
    return report


def _probe(
    names: Sequence[str],
    asked: str,
    environment: Mapping[str, str],
    timeout: float,
    progress: Callable[[str], None],
) -> tuple[Result | None, list[BackendReport]]:
    """Import torch and probe all backends in one child; where one takes it down, go on with the others.

    Returns why torch cannot be imported, if so, and a report per backend, which is empty then.
    """
    reports, waiting = [], list(names)
    while waiting:
        progress(f"torch and {', '.join(waiting)}")
        outcome = run_python([[*EXAMINE, "probe", asked, *waiting]], environment, timeout)[0]
        problem = _import_problem(outcome)
        if problem:
            return problem, [BackendReport(name) for name in names]
        for record in outcome.records[1:]:
            waiting.remove(record["name"])
            progress(f"training on {record['name']}")
            reports.append(_probed(record, asked, environment, timeout))
        if waiting:
            died = BackendReport(waiting.pop(0))
            died.block(_died("probe", outcome))
            reports.append(died)
    return None, reports


def _import_problem(outcome: Outcome) -> Result | None:
    """Why the child could not import torch; None if it could."""
    if outcome.records:
        problem = outcome.records[0]["torch"]
        return replace(Result(**problem), name="torch") if problem else None
    loaded = ", ".join(sorted(plugins().values()))
    if loaded:
        return Result(
            "fail",
            "torch",
            f"importing torch {outcome.ending} while it loads its plug-ins: {loaded}",
            f"repair or uninstall them; or, to train without, export {AUTOLOAD}=0",
        )
    what = f"importing torch {outcome.ending}: {outcome.last_line}"
    return Result("fail", "torch", what, "install torch again")


def _probed(
    record: Mapping[str, Any], asked: str, environment: Mapping[str, str], timeout: float
) -> BackendReport:
    """Turn a probe's record into a report; a backend that looks usable is then tried out."""
    backend = BackendReport(record["name"], record["priority"], record["facts"])
    problems = [Result(**problem) for problem in record["problems"]]
    backend.findings += [problem for problem in problems if problem.status == "warn"]
    # Accelerators that are not in this machine are no failure of it, unless one was asked for.
    status: Status = "fail" if record["present"] or asked == backend.name else "warn"
    for problem in problems:
        if problem.status == "fail":
            backend.block(replace(problem, status=status))
    if backend.can_train:
        facts = "; ".join(f"{key} {value}" for key, value in backend.facts.items())
        backend.findings.insert(0, Result("pass", "device", facts))
        _try_out(backend, record["ranks"], environment, timeout)
    return backend


def _try_out(backend: BackendReport, ranks: int, environment: Mapping[str, str], timeout: float) -> None:
    """Compute, communicate between ``ranks`` processes, and choose implementations."""
    # Ranks share the cores of a small machine; and one thread each is enough for what they compute.
    environment = {"OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryDirectory(prefix="portmoe-") as folder:
        store = str(Path(folder, "store"))
        commands = [
            [*EXAMINE, "try", backend.name, str(rank), str(ranks), store, str(timeout / 2)]
            for rank in range(ranks)
        ]
        outcomes = run_python(commands, environment, timeout)
    for rank, outcome in enumerate(outcomes):
        doing = "start"
        for record in outcome.records:
            if "begins" in record:
                doing = record["begins"]
            elif "operations" in record:
                backend.operations = record["operations"]
            else:
                backend.findings.append(Result(**record))
                backend.can_train = backend.can_train and record["status"] != "fail"
        if outcome.ending is not None:
            backend.block(_died(doing if ranks == 1 else f"{doing} (rank {rank} of {ranks})", outcome))


def _died(check: str, outcome: Outcome) -> Result:
    ending = outcome.ending or "reported nothing"
    return Result(
        "fail",
        check,
        f"the process that tried it {ending}: {outcome.last_line}",
        "this points at the driver or the vendor's packages: reinstall them in versions that go together",
    )
