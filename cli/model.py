"""``portmoe model``: folders of the hub."""

import click

from portmoe.cli.first_line import announce


@click.group()
def model() -> None:
    """Look at models."""


@model.command()
@click.argument("folder", metavar="FOLDER")
def inspect(folder: str) -> None:
    """Tell what model a folder of the hub holds and what training it takes, and whether it is whole.

    Reads config.json and the files' headers, not the weights.
    """
    announce(f"inspect {folder}")
    from portmoe.training.inspection import inspect as describe

    click.echo(describe(folder))
