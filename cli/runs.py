"""``portmoe runs``."""

from pathlib import Path

import click

from portmoe.cli import completions


@click.command()
@click.argument("folders", nargs=-1, metavar="[FOLDER]...", shell_complete=completions.runs)
def runs(folders: tuple[str, ...]) -> None:
    """List the runs below runs/, or below the folders given, the newest first.

    A run that is not finished goes on when its command is given again; `portmoe train --help` says when.
    """
    from portmoe.record.listing import listed, table
    from portmoe.record.run_directory import RUNS

    where = [Path(folder) for folder in folders] or [RUNS]
    found = listed(where)
    if not found:
        click.echo(f"no run below {', '.join(map(str, where))}; `portmoe train` makes one")
        return
    for line in table(found):
        click.echo(line)
