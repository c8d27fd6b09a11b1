"""``portmoe compare``."""

import sys
from pathlib import Path

import click

from portmoe.cli.first_line import announce
from portmoe.cli.options import run_argument
from portmoe.errors import TrainingError, written_to

RUN = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@run_argument("first", "RUN_A")
@run_argument("second", "RUN_B")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    default=None,
    help="An HTML page with plots.",
)
@click.option(
    "--twin",
    "twins",
    multiple=True,
    type=RUN,
    metavar="RUN",
    help="A twin of one of the two, from `portmoe train --twin N`; without any, those that lie beside it "
    "(RUN_A-twin1, …). May be repeated.",
)
def compare(first: Path, second: Path, out: Path | None, twins: tuple[Path, ...]) -> None:
    """Compare two run directories of one config, trained on two backends or in two layouts.

    Rounding grows in training: twins of the first run show how fast. As far as they agree, steps are
    compared one by one, beyond as a distribution; without twins only the first steps are. Ends with exit
    code 4 if the runs are further apart than rounding explains.
    """
    announce(f"compare {first} with {second}", loads_torch=False)
    from portmoe.verify.runs import comparison_report
    from portmoe.verify.runs.comparison import compare as compare_runs
    from portmoe.verify.runs.recorded import read_run

    found = compare_runs(read_run(first), read_run(second), twins)
    click.echo(f"{comparison_report.text(found)}\n{comparison_report.what_next(found)}")
    if out is not None:
        with written_to(out):
            out.write_text(comparison_report.html(found), encoding="utf-8")
    if not found.passed:
        sys.exit(TrainingError.exit_code)
