"""The line a command begins with, before the config is read and torch is loaded, which takes seconds."""

import click

from portmoe import __version__
from portmoe.launch.ranks import speaks


def announce(doing: str, loads_torch: bool = True) -> None:
    """Say on standard error what is being started; once, however many ranks there are."""
    if speaks():
        click.echo(
            f"portmoe {__version__}: {doing}{' (loading torch takes seconds)' * loads_torch}", err=True
        )
