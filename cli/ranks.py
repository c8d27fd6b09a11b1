"""The options of commands that start ranks, or are one."""

from collections.abc import Callable
from typing import Any

import click

from portmoe.launch.ranks import LAUNCHERS

MOST_RANKS = 2**20

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def nproc_option() -> Decorator:
    """--nproc, 1 by default."""
    return click.option(
        "--nproc",
        type=click.IntRange(1, MOST_RANKS),
        metavar="N",
        default=1,
        show_default=True,
        help="Processes on this machine.",
    )


def launcher_option(help_text: str) -> Decorator:
    """--launcher, "auto" by default."""
    return click.option(
        "--launcher", type=click.Choice(LAUNCHERS), default="auto", show_default=True, help=help_text
    )
