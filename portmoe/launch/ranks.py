"""Who this process is among the ranks, read from the launcher's environment variables."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from portmoe.errors import BackendError, ConfigError

LAUNCHERS = ("auto", "local", "torchrun", "srun")
LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 20000, 10000  # below the ports Linux hands out by itself

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


def detect(launcher: str = "auto", environ: Mapping[str, str] = os.environ) -> Ranks:
    """Read rank and world size from the launcher's environment variables.

    ``auto`` takes torchrun's variables where they are, then those of a SLURM task, else one process.

    Raises:
        ConfigError: no such launcher, or the variables contradict each other.
        BackendError: a variable the launcher should have set is missing.
    """
    if launcher not in LAUNCHERS:
        raise ConfigError(f"--launcher {launcher!r} is unknown; allowed: {', '.join(LAUNCHERS)}")
    if launcher == "auto":
        launcher = _launched_by(environ)
    if launcher == "local":
        return Ranks(0, 0, 1, 1, socket.gethostname(), LOOPBACK, 0, "local")
    ranks = _from_torchrun(environ) if launcher == "torchrun" else _from_slurm(environ)
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


def _launched_by(environ: Mapping[str, str]) -> str:
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return "torchrun"
    if "SLURM_PROCID" in environ and ("SLURM_STEP_ID" in environ or environ.get("SLURM_NTASKS", "1") != "1"):
        return "srun"
    return "local"


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


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    def number(name: str) -> int:
        return _number(environ, name, "srun")

    world_size = number("SLURM_NTASKS")
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
