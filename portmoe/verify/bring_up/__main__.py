"""``python -m portmoe.verify.bring_up --backend NAME --out FOLDER``: the first hour on a new card.

In this order, each in a process of its own with a time limit, so that whatever happens to one the others
still run:

1. ``portmoe check-env``: the machine;
2. every implementation the backend offers, alone, against float64: one that takes the driver down or never
   returns is named, and left out of all that follows;
3. ``portmoe validate --quick``, where nothing died;
4. ``portmoe bisect``: one training step, operation by operation;
5. ten steps of the packaged tiny config on the CPU and on the backend, and ``portmoe compare``;
6. ``portmoe replay`` of the CPU's run, in a version that has the command.

FOLDER then holds what each said, and SUMMARY.txt. Names of this machine and of its user are taken out.
"""

import sys
from pathlib import Path

import click

from portmoe.errors import BackendError, PortmoeError, TrainingError
from portmoe.verify.bring_up.hour import STAGES, Hour
from portmoe.verify.bring_up.summary import write


@click.command()
@click.option("--backend", required=True, help="The backend to try.")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder that is empty, or not there yet.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1, 3600),
    default=120,
    show_default=True,
    help="Seconds one implementation may take; a command may take ten times as long.",
)
@click.option("--only", multiple=True, metavar="OP.NAME", help="Of the implementations, these alone.")
@click.option(
    "--stage",
    "stages",
    multiple=True,
    type=click.Choice(list(STAGES)),
    help="These stages alone.  [default: all]",
)
def bring_up(backend: str, out: Path, timeout: float, only: tuple[str, ...], stages: tuple[str, ...]) -> None:
    """Try everything on a new card and leave what was found in one folder."""
    if out.exists() and any(out.iterdir()):
        raise click.UsageError(f"--out {str(out)!r} is not empty: name a folder that is, or a new one")
    out.mkdir(parents=True, exist_ok=True)
    hour = Hour(backend, out, timeout, only, say=click.echo)
    for name in stages or STAGES:
        STAGES[name](hour)
    write(hour, out)
    click.echo(f"\n{(out / 'SUMMARY.txt').read_text(encoding='utf-8')}\nsend back the folder {out}")
    if hour.unusable:
        sys.exit(BackendError.exit_code)
    if hour.failed:
        sys.exit(TrainingError.exit_code)


if __name__ == "__main__":
    try:
        bring_up()
    except PortmoeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
