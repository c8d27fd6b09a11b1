"""Whether the host rank 0 listens on has an address, asked before anyone waits for it."""

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

from portmoe.errors import BackendError
from portmoe.launch.ranks import Ranks

PATIENCE = 8.0  # seconds: a name may come with the machine that bears it, or never


def with_known_address(ranks: Ranks, environ: Mapping[str, str], patience: float = PATIENCE) -> Ranks:
    """``ranks`` with a ``master_address`` that has an address, be it the one SLURM knows for the node.

    Raises:
        BackendError: it has none; the message names it and what to set.
    """
    name = ranks.master_address
    deadline = time.monotonic() + patience
    problem = _unknown(name, patience / 2)
    if problem and ranks.source == "srun" and "MASTER_ADDR" not in environ:
        address = _as_slurm_knows_it(name, environ)
        if address and not _unknown(address, 1.0):
            return replace(ranks, master_address=address)
    while problem and time.monotonic() < deadline - 1:
        time.sleep(0.5)
        problem = _unknown(name, max(deadline - time.monotonic(), 0.1))
    if problem:
        raise BackendError(
            f"rank {ranks.rank} ({ranks.host}) does not know the address of {name!r}, where rank 0 is: "
            f"{problem}; set {ranks.variables[0]} to an address or a name of that host which all hosts know, "
            f"for all ranks, or enter {name!r} in the name service or in /etc/hosts"
        )
    return ranks


def _unknown(name: str, seconds: float) -> str | None:
    """Why ``name`` has no address; None if it has. A name service that does not answer is left alone."""
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            socket.getaddrinfo(name, None)
            outcome.append(None)
        except (OSError, UnicodeError) as error:
            outcome.append(getattr(error, "strerror", None) or str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"no answer within {seconds:.0f} s"


def _as_slurm_knows_it(name: str, environ: Mapping[str, str]) -> str | None:
    """The address in SLURM's aliases of cloud nodes, "name:[address]:host", or its NodeAddr."""
    for entry in environ.get("SLURM_NODE_ALIASES", "").split(","):
        alias, _, rest = entry.partition(":")
        if alias == name and rest:
            address = rest.rpartition(":")[0] or rest
            return address.strip("[]")
    if shutil.which("scontrol") is None:
        return None
    try:
        told = subprocess.run(
            ["scontrol", "show", "node", name, "--oneliner"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=2,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    fields = dict(field.partition("=")[::2] for field in told.split())
    return fields.get("NodeAddr")
