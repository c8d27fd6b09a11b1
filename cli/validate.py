"""``portmoe validate``."""

import sys
from pathlib import Path

import click

from portmoe.accelerator.discovery import prepare
from portmoe.cli.first_line import announce
from portmoe.cli.options import backend_option
from portmoe.errors import TrainingError

DTYPES = ("float32", "bfloat16", "float16")
COLOURS = {"pass": "green", "skip": "yellow", "fail": "red"}


@click.command()
@backend_option("The backend to validate.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default=None,
    help="A folder for report.json, report.xml (JUnit) and report.html.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31),
    metavar="N",
    default=0,
    show_default=True,
    help="Of the sample values.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1, 3600),
    metavar="SECONDS",
    default=300,
    show_default=True,
    help="How long the collectives, and the training run, may each take.",
)
@click.option(
    "--quick", is_flag=True, help="Few shapes, no collectives, no training run: less than a minute."
)
@click.option(
    "--only",
    default="",
    metavar="NAMES",
    help="Check these alone: operations, memory, collectives, training; as in attention,dispatch.",
)
@click.option(
    "--dtype",
    "dtypes",
    default=",".join(DTYPES),
    show_default=True,
    metavar="NAMES",
    help="Try operations with these.",
)
def validate(
    backend: str, out: Path | None, seed: int, timeout: float, quick: bool, only: str, dtypes: str
) -> None:
    """Show that a backend computes what the contracts say.

    Checks every implementation of every operation against float64, the memory pool, the collectives between
    processes and a short training run, and tells on standard error how far it is. Ends with exit code 4 if
    anything fails; interrupted, it still reports what was done.
    """
    if unknown := [name for name in _listed(dtypes) if name not in DTYPES] or not _listed(dtypes):
        raise click.UsageError(f"--dtype {dtypes!r}: {unknown} is none of {', '.join(DTYPES)}")
    announce(f"validate {backend}")
    prepare(backend)
    import torch

    from portmoe.record.progress import Progress
    from portmoe.record.terminal import terminal
    from portmoe.verify.backend import reports
    from portmoe.verify.backend.validate import Selection
    from portmoe.verify.backend.validate import validate as run

    chosen = [getattr(torch, name) for name in _listed(dtypes)]
    selection = Selection(_listed(only), chosen, quick, seed, timeout)
    with Progress(terminal(sys.stderr), unit="groups", plain_every=None) as progress:
        report = run(backend, selection, progress.say, progress)
    click.echo(reports.table(report, lambda status, text: click.style(text, fg=COLOURS[status])))
    if out is not None:
        click.echo(", ".join(map(str, reports.write(report, out))))
    click.echo(reports.what_next(report))
    if report.interrupted:
        raise KeyboardInterrupt
    if not report.passed:
        sys.exit(TrainingError.exit_code)


def _listed(names: str) -> list[str]:
    return [name for part in names.split(",") if (name := part.strip())]
