"""``portmoe data``: data sets of one's own."""

import os
import shlex
import sys
from pathlib import Path

import click


@click.group()
def data() -> None:
    """Make a data set of your own text."""


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

    A file that ends in .jsonl has a document a line, {"text": "…"}; any other is one document of UTF-8. A
    part of a file's name that is en, cn or code tells its kind in the log. Stopped and started again, the
    same command goes on; the folder is there once it is complete.
    """
    from portmoe.data.text.make import make
    from portmoe.record.progress import Progress
    from portmoe.record.terminal import terminal

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with Progress(terminal(sys.stderr), unit="parts") as progress:
        made = make(files, tokenizer, out, jobs or cores, progress)
    ends = "no end-of-document token" if made.end is None else f"token {made.end} after each document"
    click.echo(
        f"{made.folder}: {made.files:,} files, {made.samples:,} samples, {made.tokens:,} tokens below "
        f"{made.vocabulary:,}, {ends}"
    )
    keys = {"data.train_folder": str(out), "model.vocab_size": str(made.vocabulary)}
    settings = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in keys.items())
    click.echo(f"next: portmoe train --config CONFIG {settings}")
