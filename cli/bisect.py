"""``portmoe bisect``."""

import sys
from pathlib import Path

import click

from portmoe.cli import completions
from portmoe.cli.first_line import announce
from portmoe.cli.options import backend_option, config_options
from portmoe.errors import TrainingError, written_to


@click.command()
@config_options
@click.option(
    "--reference",
    default="cpu",
    show_default=True,
    metavar="BACKEND",
    shell_complete=completions.backends,
    help="The backend that is trusted.",
)
@backend_option("The backend under suspicion.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31),
    metavar="N",
    default=None,
    help="Of weights and data.  [default: run.seed of the config]",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    default=None,
    help="A file for the report: JSON, or a page where its name ends in .html.",
)
def bisect(
    config_file: str,
    overrides: tuple[str, ...],
    reference: str,
    backend: str,
    seed: int | None,
    out: Path | None,
) -> None:
    """Name the first operation of a training step that a backend computes wrong.

    The same weights and the same micro-batch on both backends. Every operation gets the reference's inputs
    and upstream gradients, so that it answers for its own errors only. Ends with exit code 4 if a defect is
    found.
    """
    announce(f"bisect a step of {config_file} on {backend}")
    from portmoe.accelerator.discovery import AUTO, find, prepare
    from portmoe.config.read import load_config
    from portmoe.record.progress import Progress
    from portmoe.record.terminal import terminal

    seeded = () if seed is None else (f"run.seed={seed}",)
    config = load_config(config_file, [*overrides, *seeded])
    if reference != AUTO:
        find(reference)
    prepare(backend)
    from portmoe.verify.bisect import bisect_report
    from portmoe.verify.bisect.bisect import bisect as walk

    with Progress(terminal(sys.stderr), unit="calls") as progress:
        found = walk(config, reference, backend, progress)
    click.echo(bisect_report.text(found))
    if out is not None:
        as_page = out.suffix in (".html", ".htm")
        report = bisect_report.html(found) if as_page else bisect_report.json(found)
        with written_to(out):
            out.write_text(report, encoding="utf-8")
    click.echo(bisect_report.what_next(found, backend, config_file, overrides))
    if not found.passed:
        sys.exit(TrainingError.exit_code)
