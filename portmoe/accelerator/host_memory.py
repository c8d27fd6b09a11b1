"""The memory that the processes here may use: the machine's, or what their container or job is given."""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True)
class HostMemory:
    """Bytes that all processes of the group share, and which limit that is, in words."""

    total: int
    limit: str

    def __str__(self) -> str:
        return f"{self.total / 2**20:,.0f} MiB ({self.limit})"


def host_memory(root: Path = ROOT) -> HostMemory:
    """The least of the machine's memory, the control group's limits and those of its parents."""
    physical = HostMemory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "the machine's memory")
    limits = [HostMemory(size, f"the control group's limit, {path}") for path, size in _group_limits(root)]
    return min([physical, *limits], key=lambda memory: memory.total)


def process_limit() -> int | None:
    """Bytes this process alone may use, as `ulimit -v` or `-d` says; None where it does not."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=None)


def likely_cause() -> str:
    """What to say of a process that was ended by SIGKILL."""
    return f"probably out of memory: the limit is {host_memory()}"


def _group_limits(root: Path) -> Iterator[tuple[Path, int]]:
    """Every limit on memory above this process, of both versions of control groups (cgroups(7))."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            yield from _upwards(mounts, group, "memory.max")
            yield from _upwards(mounts / "unified", group, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _upwards(mounts / "memory", group, "memory.limit_in_bytes")


def _upwards(mount: Path, group: str, name: str) -> Iterator[tuple[Path, int]]:
    """The limits from the group's folder up to the mount; inside of a container that is the group's own."""
    folder = mount / group.lstrip("/")
    while True:
        text = _text(folder / name).strip()
        if text.isdigit():
            yield folder / name, int(text)
        if folder == mount or mount not in folder.parents:
            return
        folder = folder.parent


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
