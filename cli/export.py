"""``portmoe export``."""

import sys
from pathlib import Path

import click

from portmoe.cli.first_line import announce
from portmoe.cli.options import StepOrBest, run_argument


@click.command()
@run_argument()
@click.option(
    "--step",
    type=StepOrBest(),
    default=None,
    metavar="N|best",
    help="Of the checkpoint; best: that of the lowest validation loss.  [default: the newest]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="The folder to write; must not exist or be empty.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default=None,
    help="Of all tensors.  [default: ckpt.export_dtype, else that of each where it came from]",
)
def export(run: Path, step: int | str | None, out: Path, dtype: str | None) -> None:
    """Write the weights of a run's checkpoint as a folder of the hub: safetensors, config.json, tokenizer.

    One process reads and writes a few MiB at a time, whatever ranks the checkpoint is from.
    """
    announce(f"export {run}")
    from portmoe.record.progress import Progress
    from portmoe.record.terminal import terminal
    from portmoe.training.hub import export_run

    with Progress(terminal(sys.stderr), unit="parameters") as progress:
        chosen = export_run(run, step, out, dtype, progress)
    click.echo(f"written: {out}, the weights after step {chosen} of {run}")
