"""Who a process is, how ranks meet, and what becomes of the ranks spawned on one machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from free_port import free_port

from portmoe.errors import BackendError, ConfigError
from portmoe.launch import launch
from portmoe.launch.ranks import detect, parse_host_list
from portmoe.launch.spawn import spawn

HERE = Path(__file__).parent
WORKER = HERE / "launch_worker.py"
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "7",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "4,3",
    "SLURM_NODELIST": "gpu[08-09]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("host[01-03,07],other", ["host01", "host02", "host03", "host07", "other"]),
        ("a,b-2,c.d.e", ["a", "b-2", "c.d.e"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]-ib", ["n098-ib", "n099-ib", "n100-ib", "n101-ib"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_host_lists(text, hosts):
    assert parse_host_list(text) == hosts


@pytest.mark.parametrize(
    "text", ["", "n[1", "n]1[", "n[a-b]", "n[]", "n[-]", "n[1-]x", "a b", "n[1-2-3]", ","]
)
def test_what_is_no_host_list_is_refused(text):
    with pytest.raises(ConfigError, match="SLURM_NODELIST"):
        parse_host_list(text)


def test_torchrun_variables():
    ranks = detect("auto", TORCHRUN | SLURM)  # inside a SLURM job torchrun has the say
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size) == (5, 1, 8, 4)
    assert (ranks.master_address, ranks.master_port, ranks.source) == ("head", 29500, "torchrun")


def test_slurm_variables():
    ranks = detect("auto", SLURM)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size) == (5, 1, 7, 3)
    assert (ranks.master_address, ranks.source) == ("gpu08", "srun")
    assert ranks.master_port == detect("srun", SLURM | {"SLURM_PROCID": "0"}).master_port
    assert ranks.master_port != detect("srun", SLURM | {"SLURM_STEP_ID": "1"}).master_port
    assert ranks.master_port != detect("srun", SLURM | {"SLURM_JOB_ID": "4712"}).master_port
    given = detect("srun", SLURM | {"MASTER_ADDR": "ib0", "MASTER_PORT": "1234"})
    assert (given.master_address, given.master_port) == ("ib0", 1234)


def test_one_node_meets_on_the_loopback():
    one = without(SLURM, "SLURM_TASKS_PER_NODE") | {"SLURM_NODELIST": "unresolvable"}
    ranks = detect("srun", one)
    assert (ranks.master_address, ranks.local_world_size) == ("127.0.0.1", 7)


@pytest.mark.parametrize(
    ("environ", "source"),
    [
        ({}, "local"),
        (TORCHRUN, "torchrun"),
        (SLURM, "srun"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, "local"),  # the shell of an allocation
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "1"}, "local"),  # a batch script
    ],
)
def test_who_launched(environ, source):
    assert detect("auto", environ).source == source


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "3",
    "PMIX_NAMESPACE": "prterun-1",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}


@pytest.mark.parametrize(
    "environ",
    [
        OPEN_MPI,
        MPICH,
        OPEN_MPI | SLURM,  # mpirun in an allocation starts its daemons by srun
        MPICH | SLURM,
        MPICH | without(SLURM, "SLURM_STEP_ID"),
        {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4"},
        {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "3"},
        {"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "3"},
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    ],
)
def test_mpi_launchers(environ):
    ranks = detect("auto", environ)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size) == (3, 3, 4, 4)
    assert (ranks.master_address, ranks.source) == ("127.0.0.1", "mpi")
    first = {name: "0" if value == "3" else value for name, value in environ.items()}
    assert detect("mpi", first).master_port == ranks.master_port
    assert detect("auto", environ | {"MASTER_PORT": "29500"}).master_port == 29500
    assert detect("auto", environ | {"MASTER_ADDR": "ib0"}).master_address == "ib0"


def test_two_jobs_of_mpi_on_a_machine_meet_apart():
    other = OPEN_MPI | {"PMIX_NAMESPACE": "prterun-2"}
    assert detect("auto", OPEN_MPI).master_port != detect("auto", other).master_port


def test_srun_with_pmi_is_srun():
    pmi = {"PMI_RANK": "5", "PMI_SIZE": "7", "PMIX_RANK": "5"}
    assert detect("auto", SLURM | pmi).source == "srun"
    assert detect("auto", SLURM | {"PMIX_RANK": "5"}).source == "srun"


@pytest.mark.parametrize(
    ("launcher", "environ", "message"),
    [
        (
            "auto",
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            "MASTER_AD",
        ),
        ("auto", {"PMIX_RANK": "1"}, "PMIX_RANK=1 and not how many ranks"),
        ("mpi", {}, "finds none of OMPI_COMM_WORLD_RANK"),
        ("auto", {"RANK": "1"}, "RANK=1 and no WORLD_SIZE"),
        ("auto", {"WORLD_SIZE": "2"}, "WORLD_SIZE=2 and no RANK"),
        ("auto", without(SLURM, "SLURM_STEP_ID"), "batch script.*put srun before"),
        ("auto", SLURM | {"SLURM_STEP_ID": str(0xFFFFFFFB)}, "batch script.*put srun before"),
        ("srun", without(SLURM, "SLURM_STEP_ID"), "batch script.*put srun before"),
    ],
)
def test_a_launch_that_is_not_understood_is_refused_at_once(launcher, environ, message):
    with pytest.raises(BackendError, match=message):
        detect(launcher, environ)


def test_local_ignores_the_others():
    ranks = detect("local", TORCHRUN | SLURM)
    assert (ranks.rank, ranks.world_size, ranks.source) == (0, 1, "local")


@pytest.mark.parametrize("name", sorted(TORCHRUN.keys() - {"LOCAL_WORLD_SIZE"}))
def test_a_missing_torchrun_variable_is_named(name):
    with pytest.raises(BackendError, match=rf"{name} is not set; torchrun sets it"):
        detect("torchrun", without(TORCHRUN, name))


OPTIONAL = {"SLURM_STEP_ID", "SLURM_TASKS_PER_NODE", "SLURM_NODELIST"}


@pytest.mark.parametrize("name", sorted(SLURM.keys() - OPTIONAL))
def test_a_missing_slurm_variable_is_named(name):
    with pytest.raises(BackendError, match=rf"{name} is not set; srun sets it"):
        detect("srun", without(SLURM, name))


@pytest.mark.parametrize(
    ("launcher", "environ", "message"),
    [
        ("torchrun", TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        ("torchrun", TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ("torchrun", TORCHRUN | {"RANK": "-1"}, "RANK='-1' must be a whole number"),
        ("torchrun", TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE='many'"),
        ("torchrun", TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        ("srun", SLURM | {"SLURM_TASKS_PER_NODE": "four"}, "SLURM_TASKS_PER_NODE='four'"),
        ("srun", SLURM | {"SLURM_NODEID": "2"}, "SLURM_NODEID=2"),
        ("mpirun", {}, "mpirun.*allowed: auto, local, torchrun, srun, mpi"),
    ],
)
def test_contradictions_are_refused(launcher, environ, message):
    with pytest.raises(ConfigError, match=message):
        detect(launcher, environ)


# Ranks meeting


def clean_environment(**more):
    names = (*TORCHRUN, *SLURM, launch.PARENT)
    return {**without(os.environ, *names), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **more}


def start_task(rank, tasks, port, timeout):
    """One task as srun would start it."""
    task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": str(tasks)}
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NODELIST": "here", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, WORKER, "meet", str(timeout)],
        env=clean_environment(**task, **job),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_tasks_of_srun_meet():
    port = free_port()
    tasks = [start_task(rank, 2, port, 60) for rank in range(2)]
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert outputs == ["met srun 0 2 cpu 3.0\n", "met srun 1 2 cpu 3.0\n"]


def test_ranks_that_stay_away_are_named_by_all_others():
    port = free_port()
    tasks = [start_task(rank, 4, port, 4) for rank in (0, 2)]
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [3, 3]
    for output in outputs:
        assert "these did not reach" in output or "cannot reach rank 0" in output, output
    assert "1, 3;" in outputs[0] or "1, 2, 3;" in outputs[0]


def test_torchrun_itself():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            WORKER,
            "meet",
            "60",
        ],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert sorted(done.stdout.splitlines()) == ["met torchrun 0 2 cpu 3.0", "met torchrun 1 2 cpu 3.0"]


# Ranks spawned


@pytest.fixture
def _own_environment(monkeypatch):
    """spawn sets variables for its ranks; the next test must not see them."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    monkeypatch.setenv(launch.PARENT, "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("_own_environment")
class TestSpawn:
    def test_success_is_silent_and_shares_the_cores(self, monkeypatch, capfd):
        monkeypatch.delenv("OMP_NUM_THREADS")
        cores = len(os.sched_getaffinity(0))
        assert spawn(2, ["succeed"], module="launch_worker") == 0
        out, err = capfd.readouterr()
        assert out.splitlines() == [f"threads {max(1, cores // 2)}"] * 2
        assert err == ""

    @pytest.mark.parametrize("code", [1, 2, 3, 4])
    def test_exit_code_of_the_rank_that_failed(self, code, capfd):
        assert spawn(2, ["fail_with", str(code)], module="launch_worker") == code
        err = capfd.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith("portmoe: rank 1 of 2 ")
        assert f"exit code {code}" in err

    def test_the_killed_rank_is_named_and_not_the_one_that_noticed(self, capfd):
        assert spawn(3, ["lose_a_peer"], module="launch_worker") == 4
        err = capfd.readouterr().err
        assert "rank 1 of 3" in err
        assert "SIGKILL, probably out of memory: the limit is " in err

    def test_restarts_after_a_kill(self, tmp_path, capfd):
        assert spawn(2, ["fail_first", str(tmp_path)], 2, module="launch_worker") == 0
        attempts = sorted(path.name for path in tmp_path.iterdir())
        assert attempts == ["attempt-0-0", "attempt-0-1", "attempt-1-0", "attempt-1-1"]
        assert "restart 1 of 2" in capfd.readouterr().err

    def test_restarted_ranks_meet_anew(self, capfd):
        """The agent keeps its store, and with it the addresses of the ranks that are gone."""
        assert spawn(2, ["meet", "60", "", "killed"], 1, module="launch_worker") == 0
        met = [line for line in capfd.readouterr().out.splitlines() if line.startswith("met")]
        assert sorted(met) == [f"met torchrun {rank} 2 cpu 3.0" for rank in (0, 0, 1, 1)]

    @pytest.mark.parametrize(("code", "attempts"), [(4, 3), (2, 1), (3, 1)])
    def test_a_mistake_is_not_tried_again(self, tmp_path, code, attempts):
        assert spawn(1, ["count_attempts", str(tmp_path), str(code)], 2, module="launch_worker") == code
        assert len(list(tmp_path.iterdir())) == attempts


def start_spawn(mode, *arguments, wrapper=()):
    call = f"spawn(2, {[mode, *arguments]}, 1, module='launch_worker')"
    program = f"import sys; from portmoe.launch.spawn import spawn; sys.exit({call})"
    command = [*wrapper, sys.executable, "-c", program]
    return subprocess.Popen(command, env=clean_environment(), start_new_session=True)


def await_files(folder, *names):
    deadline = time.monotonic() + 150  # a loaded machine imports torch slowly
    while not all((folder / name).exists() and (folder / name).read_text() for name in names):
        assert time.monotonic() < deadline, f"{names} did not come"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "wrapper"),
    [
        (signal.SIGTERM, ["nohup"]),  # which has SIGHUP ignored
        (signal.SIGINT, []),
        pytest.param(signal.SIGHUP, [], marks=pytest.mark.slow),
    ],
)
def test_a_signal_reaches_every_rank_once_and_waits_for_them(tmp_path, number, wrapper):
    parent = start_spawn("save_when_asked", str(tmp_path), wrapper=wrapper)
    await_files(tmp_path, "ready-0", "ready-1")
    if wrapper:
        parent.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert parent.poll() is None
    parent.send_signal(number)
    assert parent.wait(60) == 128 + number
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == [number.name] * 2


def test_ranks_end_with_the_process_that_spawned_them(tmp_path):
    parent = start_spawn("meet", "60", str(tmp_path))
    await_files(tmp_path, "ready-0", "ready-1")
    ranks = [int((tmp_path / f"ready-{rank}").read_text()) for rank in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in ranks):
        assert time.monotonic() < deadline, "an orphan trains on"
        time.sleep(0.05)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
