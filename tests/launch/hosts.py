"""Two hosts on this machine, for a test: network namespaces that see each other through one cable.

Needs root and iproute2. Each has a name that both resolve and an address; they share the file system.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = f"moe{os.getpid() % 10000}"
NETNS = Path("/etc/netns")  # `ip netns exec` lays what is in NAME over /etc


def possible() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    name = f"{PREFIX}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        ip("netns", "del", name)
    return made


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def start(host: str, *command: str, **variables: str) -> subprocess.Popen:
    """Start ``command`` on ``host``."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    inside = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host, *command]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *inside],
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Make both; yield their names."""
    names = (f"{PREFIX}-a", f"{PREFIX}-b")
    addresses = {name: f"10.213.77.{number}" for number, name in enumerate(names, 1)}
    known = "127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for name, a in addresses.items())
    try:
        for name in names:
            (NETNS / name).mkdir(parents=True)
            (NETNS / name / "hosts").write_text(known)
            ip("netns", "add", name)
        cable = [part for name in names for part in (name, "netns", name)]
        ip("link", "add", *cable[:3], "type", "veth", "peer", "name", *cable[3:])
        for name, address in addresses.items():
            ip("-netns", name, "address", "add", f"{address}/24", "dev", name)
            ip("-netns", name, "link", "set", name, "up")
            ip("-netns", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(NETNS / name, ignore_errors=True)
