"""One command a machine: which machine of how many this is, read from the variables its user has set.

``NPROC_PER_NODE=8 NNODES=8 PORT=29600 ADDR=head NODE_RANK=3 portmoe train …``: the command starts this
machine's ranks, and they meet those of the others. The names are too common to be read one by one: only where
``NNODES``, ``NODE_RANK`` and ``ADDR`` are all set do they say anything.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from portmoe.errors import ConfigError

TOGETHER = ("NNODES", "NODE_RANK", "ADDR")
PORT = 29500  # where the first machine is met unless PORT says otherwise, as with torchrun


@dataclass(frozen=True)
class Nodes:
    """This machine among all of the run."""

    count: int
    rank: int
    address: str  # of the first machine
    port: int
    processes: int | None  # ranks on each machine; None: not said


def nodes_of(environ: Mapping[str, str] = os.environ) -> Nodes | None:
    """What the variables say; None unless those of ``TOGETHER`` are all set.

    Raises:
        ConfigError: one is no number, or out of its range; the message names it.
    """
    if not all(environ.get(name) for name in TOGETHER):
        return None
    count = _number(environ, "NNODES", 1, 2**20)
    processes = _number(environ, "NPROC_PER_NODE", 1, 2**20) if environ.get("NPROC_PER_NODE") else None
    port = _number(environ, "PORT", 1, 65535) if environ.get("PORT") else PORT
    return Nodes(count, _number(environ, "NODE_RANK", 0, count - 1), environ["ADDR"], port, processes)


def _number(environ: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ConfigError(
            f"the environment variable {name}={text!r} must be a whole number between {least} and {most}; "
            f"correct it, or unset {', '.join(TOGETHER)} to train on this machine alone"
        )
    return int(text)
