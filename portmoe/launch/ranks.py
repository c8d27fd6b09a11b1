"""Who this process is among the ranks, read from the launcher's environment variables."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from portmoe.errors import BackendError, ConfigError
from portmoe.launch.mpi import FAMILIES, Family, family_of, rendezvous
from portmoe.launch.nodes import TOGETHER, Nodes, nodes_of

LAUNCHERS = ("auto", "local", "torchrun", "srun", "mpi", "nodes")
PARENT = "PORTMOE_PARENT_PID"  # set by spawn: the process whose end must be this rank's end
LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 20000, 10000  # below the ports Linux hands out by itself
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # SLURM's numbers for what is no step of srun's

_HOSTS = re.compile(r"(?:[\w.\-]|\[[\d,\-]+\])+")
_RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
_HOST_LIST = re.compile(rf"(?:[\w.\-]|{_RANGES})+(?:,(?:[\w.\-]|{_RANGES})+)*", re.ASCII)


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run."""

    rank: int
    local_rank: int  # among the ranks of this machine: the device's index
    world_size: int
    local_world_size: int
    host: str
    master_address: str  # where rank 0 listens
    master_port: int  # 0: one process, nothing listens
    source: str  # the launcher that said so

    @property
    def variables(self) -> tuple[str, str]:
        """What the address and the port are set by in the environment."""
        return ("ADDR", "PORT") if self.source == "nodes" else ("MASTER_ADDR", "MASTER_PORT")


def detect(launcher: str = "auto", environ: Mapping[str, str] = os.environ) -> Ranks:
    """Read rank and world size from the launcher's environment variables.

    ``auto`` takes torchrun's variables where they are, then those of an MPI launcher, then those of a SLURM
    task, else one process. ``nodes`` is for the ranks that one command a machine has started, see
    ``launch.nodes``: what spawned them gives their place on the machine, and the machine's place is in the
    environment.

    Raises:
        ConfigError: no such launcher, or the variables contradict each other.
        BackendError: a variable the launcher should have set is missing, or several processes were asked
            for and this one was not started as one of them.
    """
    if launcher not in LAUNCHERS:
        raise ConfigError(f"--launcher {launcher!r} is unknown; allowed: {', '.join(LAUNCHERS)}")
    if launcher == "auto":
        launcher = _launched_by(environ)
    if launcher == "local":
        return Ranks(0, 0, 1, 1, socket.gethostname(), LOOPBACK, 0, "local")
    by_launcher = {"torchrun": _from_torchrun, "srun": _from_slurm, "mpi": _from_mpi, "nodes": _from_nodes}
    ranks = by_launcher[launcher](environ)
    if ranks.master_port > 65535:
        raise ConfigError(f"the environment variable MASTER_PORT={ranks.master_port} must be at most 65535")
    for name, index, size in (
        ("rank", ranks.rank, ranks.world_size),
        ("local rank", ranks.local_rank, ranks.local_world_size),
    ):
        if not 0 <= index < size:
            raise ConfigError(
                f"{launcher} says {name} {index} of {size}; it must lie between 0 and {size - 1}. "
                "Unset its variables, or start through it"
            )
    return ranks


def speaks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that speaks for all: no other rank of a launch, nor started by one.

    Asked before the launcher is known for certain, see ``detect``.
    """
    family = family_of(environ)
    names = ("RANK", *([family.rank] if family else []), "SLURM_PROCID")
    rank = next((environ[name] for name in names if name in environ), "0")
    return rank == "0" and PARENT not in environ


def _launched_by(environ: Mapping[str, str]) -> str:
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return "torchrun"
    if environ.get("WORLD_SIZE", "1") != "1" or environ.get("RANK", "0") != "0":
        given, missing = ("WORLD_SIZE", "RANK") if "WORLD_SIZE" in environ else ("RANK", "WORLD_SIZE")
        raise BackendError(
            f"the environment has {given}={environ[given]} and no {missing}, so which of how many processes "
            f"this is cannot be told; set {missing} too, unset {given}, or use --launcher local"
        )
    if (family := family_of(environ)) and not _is_slurms_own(family, environ):
        return "mpi"
    if "SLURM_PROCID" in environ and (_in_a_step(environ) or environ.get("SLURM_NTASKS", "1") != "1"):
        return "srun"
    return "local"


def _is_slurms_own(family: Family, environ: Mapping[str, str]) -> bool:
    """srun gives its tasks PMI's variables too; an MPI launcher inside of a job gives ranks of its own."""
    if "SLURM_PROCID" not in environ or not _in_a_step(environ):
        return False
    if family.size not in environ:
        return True
    theirs = (environ[family.rank], environ[family.size])
    return theirs == (environ["SLURM_PROCID"], environ.get("SLURM_NTASKS"))


def _in_a_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process. A batch script's shell has no step, or one of the last numbers."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _from_torchrun(environ: Mapping[str, str]) -> Ranks:
    def number(name: str) -> int:
        return _number(environ, name, "torchrun")

    return Ranks(
        number("RANK"),
        number("LOCAL_RANK"),
        number("WORLD_SIZE"),
        number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else number("WORLD_SIZE"),
        socket.gethostname(),
        _text(environ, "MASTER_ADDR", "torchrun"),
        number("MASTER_PORT"),
        "torchrun",
    )


def _from_nodes(environ: Mapping[str, str]) -> Ranks:
    nodes = nodes_of(environ)
    if nodes is None:
        missing = ", ".join(name for name in TOGETHER if not environ.get(name))
        raise BackendError(
            f"--launcher nodes needs {', '.join(TOGETHER)} in the environment, and {missing} is not set; set "
            "them on every machine, or use --launcher local"
        )
    local_rank, here = (_number(environ, name, "nodes") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return Ranks(
        nodes.rank * here + local_rank,
        local_rank,
        nodes.count * here,
        here,
        socket.gethostname(),
        nodes.address,
        nodes.port,
        "nodes",
    )


def machine_of(launcher: str, environ: Mapping[str, str] = os.environ) -> Nodes | None:
    """This machine's place where the command is to start its ranks; None where the command is a rank itself.

    The ranks of a launcher go before, unless srun has started the one process a machine that is to start
    the ranks there.
    """
    if launcher not in ("auto", "nodes") or ("RANK" in environ and "WORLD_SIZE" in environ):
        return None
    nodes = nodes_of(environ)
    if nodes is None or launcher == "nodes":
        return nodes
    started = _launched_by(environ)
    if started == "srun" and _number(environ, "SLURM_NTASKS", "srun") == nodes.count:
        return nodes if _slurm_tasks_here(environ, nodes.count) == 1 else None
    return nodes if started == "local" else None


def _from_mpi(environ: Mapping[str, str]) -> Ranks:
    family = family_of(environ)
    if family is None:
        raise BackendError(
            f"--launcher mpi finds none of {', '.join(f.rank for f in FAMILIES)} in the environment; "
            "start through mpirun or mpiexec, or use --launcher local"
        )

    def number(name: str) -> int:
        return _number(environ, name, family.name)

    if family.size not in environ:
        raise BackendError(
            f"{family.name} says {family.rank}={environ[family.rank]} and not how many ranks there are; "
            "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each rank, or start through "
            "torchrun"
        )
    rank, world_size = number(family.rank), number(family.size)
    local_rank = number(family.local_rank) if family.local_rank in environ else rank
    local_size = number(family.local_size) if family.local_size in environ else world_size
    address, port = rendezvous(family, environ, one_machine=local_size == world_size)
    own = number("MASTER_PORT") if port is None else FIRST_PORT + int(port) % PORTS
    return Ranks(rank, local_rank, world_size, local_size, socket.gethostname(), address, own, "mpi")


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    def number(name: str) -> int:
        return _number(environ, name, "srun")

    world_size = number("SLURM_NTASKS")
    if world_size > 1 and not _in_a_step(environ):
        raise BackendError(
            f"this is the shell of a batch script (SLURM_NTASKS={world_size}, no SLURM_STEP_ID), not one of "
            "its tasks; put srun before the command, as in `srun portmoe train …`, or use `--launcher local "
            f"--nproc {world_size}` for ranks on this machine"
        )
    hosts = _slurm_hosts(environ)
    if "MASTER_PORT" in environ:
        port = number("MASTER_PORT")
    else:  # the same on every rank, another for every job and step
        step = number("SLURM_STEP_ID") if "SLURM_STEP_ID" in environ else 0
        port = FIRST_PORT + (number("SLURM_JOB_ID") * 64 + step) % PORTS
    return Ranks(
        number("SLURM_PROCID"),
        number("SLURM_LOCALID"),
        world_size,
        _slurm_tasks_here(environ, world_size),
        socket.gethostname(),
        environ.get("MASTER_ADDR") or (hosts[0] if len(hosts) > 1 else LOOPBACK),
        port,
        "srun",
    )


def _slurm_hosts(environ: Mapping[str, str]) -> list[str]:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    name = next((name for name in names if environ.get(name)), names[0])
    return parse_host_list(_text(environ, name, "srun"), name)


def _slurm_tasks_here(environ: Mapping[str, str], world_size: int) -> int:
    """This node's entry of "4(x2),3": four tasks on each of two nodes, three on the last."""
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    text = next((environ[name] for name in names if environ.get(name)), None)
    if text is None:
        return world_size
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(
                f"SLURM_TASKS_PER_NODE={text!r} is not of the form '4(x2),3'; start through srun"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID", "srun") if len(counts) > 1 else 0
    if node >= len(counts):
        raise ConfigError(f"SLURM_NODEID={node} but SLURM_TASKS_PER_NODE={text!r} has {len(counts)} nodes")
    return counts[node]


def parse_host_list(text: str, name: str = "SLURM_NODELIST") -> list[str]:
    """Expand SLURM's "gpu[01-03,07],login" into its host names, in order.

    Raises:
        ConfigError: not of this form.
    """
    if not _HOST_LIST.fullmatch(text):
        raise ConfigError(f"{name}={text!r} is not a host list like 'gpu[01-03,07],login'; set MASTER_ADDR")
    hosts: list[str] = []
    for part in _HOSTS.findall(text):
        expanded = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]+)\]", part):
            endings = [plain] if plain else _expand_ranges(ranges)
            expanded = [head + ending for head in expanded for ending in endings]
        hosts += expanded
    return hosts


def _expand_ranges(ranges: str) -> list[str]:
    numbers: list[str] = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def _text(environ: Mapping[str, str], name: str, launcher: str) -> str:
    value = environ.get(name)
    if not value:
        raise BackendError(
            f"the environment variable {name} is not set; {launcher} sets it for every rank. Start through "
            f"{launcher}, set {name}, or use --launcher local"
        )
    return value


def _number(environ: Mapping[str, str], name: str, launcher: str) -> int:
    text = _text(environ, name, launcher)
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(
            f"the environment variable {name}={text!r} must be a whole number, as {launcher} sets it"
        )
    return int(text)
