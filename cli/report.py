"""``portmoe report``."""

import sys
from pathlib import Path

import click

from portmoe.cli import completions
from portmoe.cli.first_line import announce
from portmoe.cli.options import run_argument
from portmoe.config.names import BENCHMARK
from portmoe.errors import TrainingError


@click.command()
@run_argument()
@click.option(
    "--against",
    default=BENCHMARK,
    show_default=True,
    metavar="BENCHMARK",
    shell_complete=completions.configs,
    help="The config the rules are about: a YAML file, or the name of a packaged one.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default=None,
    help="A folder for acceptance.html and acceptance.json.  [default: RUN]",
)
def report(run: Path, against: str, out: Path | None) -> None:
    """Check a run against a benchmark's rules, one by one, and file what an organiser needs.

    Ends with exit code 4 if a rule is broken, or a fact missing or contradicted by another.
    """
    announce(f"report {run} against {against}")
    from portmoe.config.read import load_config
    from portmoe.verify.acceptance import report as pages
    from portmoe.verify.acceptance.findings import examine

    found = examine(run, load_config(against), against)
    click.echo(pages.text(found))
    click.echo(", ".join(map(str, pages.write(found, out or run))))
    click.echo(f"next: portmoe verify {run}, by whoever did not make the run")
    if not found.passed:
        sys.exit(TrainingError.exit_code)
