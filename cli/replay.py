"""``portmoe replay``."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portmoe.accelerator.discovery import prepare
from portmoe.cli.first_line import announce
from portmoe.cli.options import backend_option, run_argument
from portmoe.cli.ranks import launcher_option, nproc_option
from portmoe.errors import TrainingError, written_to
from portmoe.launch.interrupt import exit_code
from portmoe.launch.ranks import PARENT, detect

if TYPE_CHECKING:
    from portmoe.config import Config
    from portmoe.verify.replay.recorded import Recorded
    from portmoe.verify.replay.replay import Replay


@click.command()
@run_argument()
@backend_option("What computes the steps.")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="A folder for replay.json, replay.html and the steps as they were made again.",
)
@click.option(
    "--steps",
    metavar="STEPS",
    default=None,
    help="The checkpoints to start from, as 0,50-100.  [default: all]",
)
@click.option(
    "--dtype",
    type=click.Choice(("float32", "tf32", "bfloat16", "float16")),
    default=None,
    help="What to compute in.  [default: as the run]",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the layout or the choice of operations. May be repeated.",
)
@nproc_option()
@launcher_option("Who starts them.")
def replay(
    run: Path,
    backend: str,
    out: Path,
    steps: str | None,
    dtype: str | None,
    overrides: tuple[str, ...],
    nproc: int,
    launcher: str,
) -> None:
    """Compute the step after each checkpoint of a run again, and hold it to what the run recorded.

    From exactly its weights, moments, place in the data and noise, on any backend and in any layout. One
    step cannot be chaotic, so rounding explains little, at any stage of training. Ends with exit code 4 if a
    step differs. ckpt.keep_steps leaves the checkpoints it needs.
    """
    announce(f"replay {run} on {backend}")
    prepare(backend)
    from portmoe.accelerator import get_accelerator
    from portmoe.verify.replay.recorded import config_of_replay, read_recorded
    from portmoe.verify.replay.replay import RECORD, replay_of

    backend = get_accelerator(backend).name
    recorded = read_recorded(run, overrides, steps)
    me = detect(launcher)
    ranks = nproc if nproc > 1 else me.world_size
    config = config_of_replay(recorded, out / RECORD, backend, ranks, dtype, overrides)
    if not me.rank:  # the others wait for this one before they look
        shutil.rmtree(out / RECORD, ignore_errors=True)
    if nproc > 1:
        given = (("--steps", steps), ("--dtype", dtype), *(("--set", override) for override in overrides))
        again = [part for name, value in given if value is not None for part in (name, value)]
        _spawn(nproc, ["replay", str(run), "--backend", backend, "--out", str(out), *again])
    else:
        _recompute(config, recorded, backend, launcher)
        if me.rank or PARENT in os.environ:
            return  # one process judges: the first, or the one that started all
    found = replay_of(recorded, out)
    _show(found, out)
    if not found.passed:
        sys.exit(TrainingError.exit_code)


def _spawn(nproc: int, argv: Sequence[str]) -> None:
    from portmoe.launch.spawn import spawn

    if code := spawn(nproc, [*argv, "--launcher", "torchrun"]):
        sys.exit(code)


def _recompute(config: "Config", recorded: "Recorded", backend: str, launcher: str) -> None:
    from portmoe.verify.replay.recompute import recompute

    stopped_by = recompute(config, recorded, backend, launcher, click.echo)
    if stopped_by is not None:
        sys.exit(exit_code(stopped_by))


def _show(found: "Replay", out: Path) -> None:
    from portmoe.verify.replay import report

    click.echo(f"{report.text(found)}\n{report.what_next(found)}")
    with written_to(out):
        report.write(found, out)
