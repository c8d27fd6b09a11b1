"""``portmoe data``: data of one's own."""

import shlex
import sys
from pathlib import Path

import click

from portmoe.cli.first_line import announce
from portmoe.cli.options import config_options
from portmoe.cli.ranks import MOST_RANKS
from portmoe.errors import written_to


@click.group()
def data() -> None:
    """Look at your own conversations and text, and make a data set of text."""


@data.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    required=True,
    metavar="bytes|FOLDER|FILE",
    help="bytes, a folder with a tokenizer.json, or such a file.",
)
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder to make; not there before.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    default=None,
    help="Processes.  [default: the cores this one may use]",
)
def tokenize(files: tuple[Path, ...], tokenizer: str, out: Path, jobs: int | None) -> None:
    """Make a folder for the key data.train_folder of files of text, or of all those below folders.

    A file that ends in .jsonl has a document a line, {"text": "…"}, one in .parquet a document a row, a .json
    that is named an array of them; any other is one document of UTF-8. A part of a file's name that is en, cn
    or code tells its kind in the log. Stopped and started again, the same command goes on; the folder is
    there once it is complete.
    """
    announce(f"tokenize with {tokenizer}", loads_torch=False)
    from portmoe.cores import usable_cores
    from portmoe.data.text.make import make
    from portmoe.record.progress import Progress
    from portmoe.record.terminal import terminal

    with Progress(terminal(sys.stderr), unit="parts") as progress:
        made = make(files, tokenizer, out, jobs or usable_cores(), progress)
    ends = "no end-of-document token" if made.end is None else f"token {made.end} after each document"
    click.echo(
        f"{made.folder}: {made.files:,} files, {made.samples:,} samples, {made.tokens:,} tokens below "
        f"{made.vocabulary:,}, {ends}"
    )
    keys = {"data.train_folder": str(out), "model.vocab_size": str(made.vocabulary)}
    settings = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in keys.items())
    click.echo(f"next: portmoe train {settings}")


@data.command()
@config_options
@click.option(
    "--samples",
    type=click.IntRange(0, 1000),
    default=3,
    show_default=True,
    metavar="N",
    help="How many samples to show, spread over the data.",
)
@click.option(
    "--world-size",
    type=click.IntRange(1, MOST_RANKS),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of ranks that the steps are counted for.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    metavar="FILE",
    help="Write it as a page, too: FILE.html.",
)
def preview(
    config_file: str, overrides: tuple[str, ...], samples: int, world_size: int, out: Path | None
) -> None:
    """Show the training data of a config as the model will see them, without training.

    Some samples with what is learned marked, the samples' lengths, how full the packs are, how many steps an
    epoch takes, and what is left out or cut, by file and line. What it tokenizes, training finds in the
    cache.
    """
    announce(f"preview {config_file}", loads_torch=False)
    from portmoe.config.read import load_config
    from portmoe.files import write_whole
    from portmoe.planning import preview as preview_of
    from portmoe.planning import preview_report
    from portmoe.record.progress import told_when_due
    from portmoe.record.terminal import terminal

    with told_when_due("parts") as told:
        found = preview_of.preview(load_config(config_file, overrides), world_size, samples, told)
    preview_report.told(found, terminal())
    if out is not None:
        with written_to(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, preview_report.html(found, config_file))
        click.echo(str(out))
