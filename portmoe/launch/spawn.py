"""Starting several ranks on this machine through torch's elastic agent."""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from portmoe.accelerator.host_memory import likely_cause
from portmoe.cores import usable_cores
from portmoe.errors import BackendError, ConfigError, TrainingError
from portmoe.launch.interrupt import SIGNALS, exit_code, heeded
from portmoe.launch.nodes import Nodes
from portmoe.launch.ranks import PARENT

_STOPPED = tuple(map(exit_code, SIGNALS))  # of ranks that were asked to stop
_PERMANENT = (ConfigError.exit_code, BackendError.exit_code)  # a restart would meet them again


def spawn(
    nproc: int,
    argv: Sequence[str],
    max_restarts: int = 0,
    *,
    module: str = "portmoe",
    machine: Nodes | None = None,
) -> int:
    """Run ``python -m module argv`` as ``nproc`` ranks on this machine; return the exit code.

    The code is 0, or that of the rank that failed first; a rank ended by a signal counts as a
    failed training. After a failure that another attempt may not meet again, all ranks are started
    anew, ``max_restarts`` times at most. SIGTERM, SIGINT and SIGHUP, unless the caller ignores them, are
    passed on, and the ranks save and end on their own; a second SIGINT makes them leave at once.

    Args:
        machine: this one's place where others have ranks of the run too. Each starts its own again.
    """
    _quiet_elastic_logs()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // nproc)))
    os.environ[PARENT] = str(os.getpid())
    # The agent would turn these into an exception and end the ranks; SIGQUIT alone keeps that meaning.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(n.name for n in heeded([signal.SIGQUIT]))
    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="localhost",
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=nproc,
        entrypoint=sys.executable,
        args=("-m", module, *argv),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=max_restarts,
        monitor_interval=0.1,
        local_addr="localhost",
    )
    agent = _Agent(spec, DefaultLogsSpecs(log_dir=os.devnull))
    if machine is not None:
        agent.first, agent.ranks = machine.rank * nproc, machine.count * nproc
    try:
        with _forwarded_signals(agent):
            result = agent.run()
    except _NoRestart as stopped:
        result = stopped.result
    except SignalException as quit_signal:
        _say(f"ended by {quit_signal.sigval.name}")
        return TrainingError.exit_code
    finally:
        spec.rdzv_handler.shutdown()
    return _exit_code(_root_cause(result.failures), agent.passed_on) if result.is_failed() else 0


class _NoRestart(Exception):
    """Leaves the agent's loop when another attempt makes no sense."""

    def __init__(self, result: RunResult) -> None:
        super().__init__()
        self.result = result


class _Agent(LocalElasticAgent):
    """torch's elastic agent, saying in one line which rank failed and not restarting in vain."""

    passed_on: signal.Signals | None = None  # the first signal that was
    restarts = 0
    first = 0  # rank here
    ranks: int | None = None  # of the run; None: those here

    def pids(self) -> list[int]:
        """The ranks' process ids."""
        return [worker.id for worker in self.get_worker_group().workers if worker.id]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        pids = super()._start_workers(worker_group)
        if self.passed_on:  # it came before there was anyone to pass it on to
            _send(self.passed_on, pids.values())
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED:
            failure = _root_cause(result.failures)
            if failure.exitcode in _STOPPED or (self.passed_on and failure.exitcode == -self.passed_on):
                raise _NoRestart(result)
            rank = next(rank for rank, of_rank in result.failures.items() if of_rank is failure)
            how = (
                f"was ended by {signal.Signals(-failure.exitcode).name}"
                if failure.exitcode < 0
                else f"ended with exit code {failure.exitcode}"
            )
            if failure.exitcode == -signal.SIGKILL:
                how += f", {likely_cause()}"
            ranks = self.ranks or worker_group.spec.local_world_size
            _say(f"rank {self.first + rank} of {ranks} (process {failure.pid}) {how}")
            if self.passed_on or failure.exitcode in _PERMANENT:
                raise _NoRestart(result)
            if self.restarts < worker_group.spec.max_restarts:
                self.restarts += 1
                _say(f"starting all ranks again, restart {self.restarts} of {worker_group.spec.max_restarts}")
        return result


def _root_cause(failures: Mapping[int, ProcessFailure]) -> ProcessFailure:
    """The failure the others follow from: ranks that only lost a peer end as a failed training,
    and those the agent ended get SIGTERM, so any other ending came first."""

    def order(failure: ProcessFailure) -> tuple[int, int]:
        consequence = {TrainingError.exit_code: 1, -signal.SIGTERM: 2}.get(failure.exitcode, 0)
        return consequence, failure.timestamp

    return min(failures.values(), key=order)


def _exit_code(failure: ProcessFailure, passed_on: signal.Signals | None) -> int:
    if passed_on and failure.exitcode == -passed_on:  # it came before the rank could heed it
        return exit_code(passed_on)
    return TrainingError.exit_code if failure.exitcode < 0 else failure.exitcode


@contextlib.contextmanager
def _forwarded_signals(agent: _Agent) -> Iterator[None]:
    """Pass on to the ranks, which save and end by themselves, the signals that the caller does not ignore."""

    def forward(number: int, frame: FrameType | None) -> None:
        agent.passed_on = agent.passed_on or signal.Signals(number)
        _send(number, agent.pids())

    former = {number: signal.signal(number, forward) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _send(number: int, pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _quiet_elastic_logs() -> None:
    """The agent's own log lines repeat ours and come with its traceback."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _say(line: str) -> None:
    print(f"portmoe: {line}", file=sys.stderr, flush=True)
