"""A SLURM of its own, for a test: controller, authentication and a few nodes on this machine.

Needs slurmctld, slurmd and munged (Debian: slurm-wlm and munge). The nodes are daemons with names that no
resolver knows, as in a cloud; each claims four processors.
"""

import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from free_port import free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "scancel")
CONFIG = """
ClusterName=portmoe
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait={kill_wait}
SchedulerParameters=sched_interval=1,bf_interval=1
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def path():
    return os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def missing():
    """Those of the programs this needs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=path()) is None]


class Cluster:
    """A running SLURM; its commands find it by ``environment``, and run in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PMI"))}
        self.environment = kept | {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), path())),  # portmoe is in the first
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *command: str, **options: object) -> subprocess.Popen:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
        return subprocess.Popen(command, env=self.environment, cwd=self.folder, **options)

    def run(self, *command: str, timeout: float = 240) -> tuple[int, str]:
        """Run a command to its end; its exit code and all it said."""
        process = self.start(*command)
        try:
            said = process.communicate(timeout=timeout)[0]
        finally:
            process.kill()
        return process.returncode, said

    def said(self, *command: str) -> str:
        code, said = self.run(*command)
        assert code == 0, said
        return said.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.said("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 240) -> None:
        until = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < until, f"{what}: not within {timeout:g} s\n{self.logs()}"
            time.sleep(0.3)

    def logs(self) -> str:
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-2000:]}" for file in files)


@contextmanager
def cluster(nodes: int = 4, kill_wait: int = 60) -> Iterator[Cluster]:
    """Start a SLURM of ``nodes`` nodes; it and its jobs end with the block."""
    # A socket's name is at most some hundred characters long, which pytest's folders may exceed.
    folder = Path(tempfile.mkdtemp(prefix="portmoe-slurm-"))
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    names = [f"node{number}" for number in range(nodes)]
    lines = [
        f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname=localhost Port={free_port()} CPUs=4 State=UNKNOWN"
        for name in names
    ]
    text = CONFIG.format(
        controller=free_port(),
        user=pwd.getpwuid(os.getuid()).pw_name,
        folder=folder,
        kill_wait=kill_wait,
        nodes="\n".join(lines),
    )
    (folder / "slurm.conf").write_text(text)
    made = Cluster(folder)
    munge = {name: str(folder / f"munge.{name}") for name in ("socket", "pid", "log", "seed")}
    commands = {
        "munged": [
            *("munged", "--foreground", "--force", "--key-file", str(folder / "munge.key")),
            *("--socket", munge["socket"], "--pid-file", munge["pid"], "--log-file", munge["log"]),
            *("--seed-file", munge["seed"]),
        ],
        "slurmctld": ["slurmctld", "-D", "-f", str(folder / "slurm.conf")],
        **{name: ["slurmd", "-D", "-N", name, "-f", str(folder / "slurm.conf")] for name in names},
    }
    daemons = []
    try:
        for name, command in commands.items():
            output = (folder / f"{name}.log").open("w")
            daemons.append(made.start(*command, stdout=output))
            if name == "munged":
                made.wait((folder / "munge.socket").exists, "munged")
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        made.wait(lambda: made.run(*idle)[1].strip() == str(nodes), "the nodes")
        yield made
    finally:
        made.run("scancel", "--partition=all")
        made.run("scancel", "--signal=KILL", "--partition=all")
        with suppress(AssertionError):  # a daemon that ends before its jobs leaves their processes behind
            made.wait(lambda: not made.run("squeue", "--noheader")[1].strip(), "the jobs' end", timeout=60)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)
