"""``portmoe model``: folders of the hub."""

import click

from portmoe.cli import completions
from portmoe.cli.first_line import announce


@click.group()
def model() -> None:
    """Look at models."""


@model.command(short_help="Tell what model a folder holds and what training it takes.")
@click.argument("folder", metavar="FOLDER", shell_complete=completions.folders)
def inspect(folder: str) -> None:
    """Tell what model a folder of the hub holds and what training it takes, and whether it is whole.

    Reads config.json and the files' headers, not the weights.
    """
    announce(f"inspect {folder}")
    from portmoe.training.inspection import inspect as describe

    click.echo(describe(folder))
