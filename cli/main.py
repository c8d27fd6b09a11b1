"""The ``portmoe`` command: its subcommands, loaded when called, and the one place where errors are shown.

Help and usage errors never import torch; a subcommand's module is imported when it runs.
"""

import io
import signal
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from portmoe import __version__
from portmoe.errors import PortmoeError
from portmoe.record.terminal import coloured

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


class LazyGroup(click.Group):
    """A group that imports a subcommand ("module:attribute") only when it is asked for."""

    def __init__(self, *args: Any, subcommands: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.subcommands = subcommands

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.subcommands)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.subcommands:
            return None
        module, attribute = self.subcommands[name][0].split(":")
        return getattr(import_module(module), attribute)

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = arguments[0]
        if name not in self.subcommands and (near := get_close_matches(name, self.subcommands, n=1)):
            raise click.UsageError(f"No such command {name!r}; did you mean {near[0]}?", context)
        return super().resolve_command(context, arguments)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.subcommands.items()])


@click.group(
    cls=LazyGroup,
    subcommands={
        "train": ("portmoe.cli.train:train", "Train a model, or show with --dry-run what training it takes."),
        "runs": ("portmoe.cli.runs:runs", "List the runs there are, and how each one ended."),
        "data": ("portmoe.cli.data:data", "Look at your own conversations and text, and make a data set."),
        "config": ("portmoe.cli.config:config", "Print a config with every key resolved, or import one."),
        "validate": ("portmoe.cli.validate:validate", "Show that a backend computes what it must."),
        "compare": ("portmoe.cli.compare:compare", "Compare two runs of one config."),
        "replay": ("portmoe.cli.replay:replay", "Compute recorded steps again, from their checkpoints."),
        "report": ("portmoe.cli.report:report", "Check a run against a benchmark's rules, for filing."),
        "verify": ("portmoe.cli.verify:verify", "Check a run directory that someone else has made."),
        "bisect": ("portmoe.cli.bisect:bisect", "Name the first operation a backend computes wrong."),
        "model": ("portmoe.cli.model:model", "Tell what a folder of the hub is, and what training it takes."),
        "chat": ("portmoe.cli.chat:chat", "Talk to the model of a run or of a folder."),
        "export": ("portmoe.cli.export:export", "Write a run's weights as a folder of the hub."),
        "check-env": ("portmoe.cli.check_env:check_env", "Check what this machine can train on."),
        "completion": (
            "portmoe.cli.completion:completion",
            "Let a shell complete what is typed after portmoe.",
        ),
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="portmoe")
def cli() -> None:
    """Train Mixture-of-Experts language models on any accelerator, with the same numbers."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; anything a user can cause ends in one message."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a character we print
    try:
        colours = None if coloured(sys.stdout) else False
        return cli.main(arguments, prog_name="portmoe", standalone_mode=False, color=colours) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PortmoeError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED


def main() -> None:
    """The installed ``portmoe`` script.

    What has ended has its exit code: a Ctrl-C while the interpreter clears up changes nothing.
    """
    try:
        sys.exit(run())
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
