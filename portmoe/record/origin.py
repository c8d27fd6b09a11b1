"""Who made a report, when, where and with which command: one block for all of them. Works without torch."""

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import portmoe

COMMAND = "PORTMOE_COMMAND"  # set for the ranks that a command starts


def of_report(facts: Mapping[str, object] | None = None, seed: int | None = None) -> dict[str, object]:
    """Return the block that every report carries, JSON-ready.

    Args:
        facts: of the device and its driver, as a probe gives them.
        seed: None where nothing was drawn.
    """
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "host": socket.gethostname(),
        "command": command(),
        "seed": seed,
        "portmoe": portmoe.__version__,
        "commit": commit(),
        "torch": torch,
        "python": platform.python_version(),
        "system": platform.platform(),
        **(facts or {}),
    }


def command() -> str:
    """The command line as a person typed it, also on ranks that the command has started."""
    if COMMAND in os.environ:
        return os.environ[COMMAND]
    program, *arguments = sys.argv
    if Path(program).name == "__main__.py":
        return shlex.join(["python", "-m", "portmoe", *arguments])
    return shlex.join([Path(program).name, *arguments])


def commit() -> str | None:
    """The commit of the checkout portmoe runs from; None where it runs from an installed wheel."""
    home = Path(portmoe.__file__).parent
    if not (home.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=home,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
