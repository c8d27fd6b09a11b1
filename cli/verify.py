"""``portmoe verify``."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portmoe.accelerator.discovery import prepare
from portmoe.cli import completions
from portmoe.cli.first_line import announce
from portmoe.cli.options import run_argument
from portmoe.errors import ConfigError, TrainingError, written_to

if TYPE_CHECKING:
    from portmoe.verify.evidence.verify import Verification


@click.command()
@run_argument()
@click.option(
    "--replay",
    "backend",
    metavar="BACKEND",
    shell_complete=completions.backends,
    default=None,
    help="Compute some of its steps again on this backend, in this process.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default=None,
    help="A folder for verify.json and verify.html.",
)
def verify(run: Path, backend: str | None, out: Path | None) -> None:
    """Check a run directory that someone else has made.

    Its files against each other, against the hashes written with them, and against what follows from its
    config: schedules, batches, counts and sums. Ends with exit code 4 if anything does not fit.
    """
    announce(f"verify {run}" + (f", and replay steps of it on {backend}" if backend else ""))
    prepare(backend or "cpu")
    from portmoe.verify.evidence import report
    from portmoe.verify.evidence.verify import verify as check

    found = check(run)
    if backend is not None:
        found = _replayed(found, backend, out)
    click.echo(report.text(found))
    if out is not None:
        with written_to(out):
            report.write(found, out)
    if not found.passed:
        sys.exit(TrainingError.exit_code)


def _replayed(found: "Verification", backend: str, out: Path | None) -> "Verification":
    """With the outcome of a replay of some steps; one that cannot be made is a result too."""
    from portmoe.result import Result
    from portmoe.verify.evidence.verify import spread
    from portmoe.verify.replay.recompute import recompute
    from portmoe.verify.replay.recorded import config_of_replay, read_recorded
    from portmoe.verify.replay.replay import RECORD, replay_of

    with _folder(out) as folder:
        try:
            recorded = read_recorded(found.path)
            recorded = replace(recorded, starts=spread(recorded.starts))
            config = config_of_replay(recorded, folder / RECORD, backend, 1, None, ())
            recompute(config, recorded, backend, "local", click.echo)
            made = replay_of(recorded, folder)
        except (ConfigError, TrainingError) as error:
            failed = Result("fail", "can be replayed", str(error), subject="the run", part="replay")
            return replace(found, results=[*found.results, failed])
    results = [
        replace(result, part="replay", name=f"{result.name} ({result.part})") for result in made.results
    ]
    return replace(found, results=[*found.results, *results], replay=made)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where the steps made again are recorded: kept where reports are."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="portmoe-") as folder:
            yield Path(folder)
    else:
        shutil.rmtree(out / "replayed", ignore_errors=True)
        yield out
