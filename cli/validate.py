"""``portmoe validate``."""

import sys
from pathlib import Path

import click

from portmoe.accelerator.discovery import AUTO, prepare
from portmoe.errors import TrainingError

COLOURS = {"pass": "green", "skip": "yellow", "fail": "red"}


@click.command()
@click.option("--backend", default=AUTO, show_default=True, help="The backend to validate.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Directory for report.json, report.xml (JUnit) and report.html.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of the sample values."
)
@click.option(
    "--timeout",
    type=click.FloatRange(1, 3600),
    default=300,
    show_default=True,
    help="Seconds the collectives, and the training run, may each take.",
)
@click.option(
    "--quick", is_flag=True, help="Few shapes, no collectives, no training run: less than a minute."
)
def validate(backend: str, out: Path | None, seed: int, timeout: float, quick: bool) -> None:
    """Show that a backend computes what the contracts say.

    Checks every implementation of every operation against float64, the collectives between processes, the
    memory pool and a short training run. Ends with exit code 4 if anything fails.
    """
    prepare(backend)
    from portmoe.verify.backend import reports
    from portmoe.verify.backend.validate import validate as run

    report = run(backend, seed, timeout, progress=_progress, quick=quick)
    if sys.stderr.isatty():
        click.echo("\r\033[K", nl=False, err=True)
    click.echo(reports.table(report, lambda status, text: click.style(text, fg=COLOURS[status])))
    if out is not None:
        click.echo(", ".join(map(str, reports.write(report, out))))
    if not report.passed:
        sys.exit(TrainingError.exit_code)


def _progress(what: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\033[Kchecking {what}", nl=False, err=True)
