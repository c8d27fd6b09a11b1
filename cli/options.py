"""Options that several commands share."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from portmoe.cli import completions
from portmoe.config.names import FROM_FOLDER, PRETRAINED

TINY = "tiny_moe4.yaml"

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class StepOrBest(click.IntRange):
    """A number of steps, or the word "best"."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Take the word as it is."""
        return value if value == "best" else super().convert(value, parameter, context)


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--config and --set, as ``config_file`` and ``overrides``.

    Without --config it is the tiny one, or, where a folder is to give the model, nothing but the overrides.
    """

    @wraps(function)
    def with_file(*args: Any, config_file: str | None, overrides: tuple[str, ...], **options: Any) -> Any:
        if config_file is None:
            of_a_folder = any(override.partition("=")[0].strip() == PRETRAINED for override in overrides)
            config_file = FROM_FOLDER if of_a_folder else TINY
        return function(*args, config_file=config_file, overrides=overrides, **options)

    name = click.option(
        "--config",
        "config_file",
        default=None,
        metavar="FILE",
        shell_complete=completions.configs,
        help="A YAML file, or a packaged config's name, as 7b_moe4; a name that is none lists them.  "
        f"[default: {TINY}]",
    )
    overrides = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        shell_complete=completions.keys,
        help="Override a key, as in --set moe.top_k=1. May be repeated.",
    )
    return name(overrides(with_file))


def backend_option(help_text: str) -> Decorator:
    """--backend, "auto" by default."""
    return click.option(
        "--backend",
        default="auto",
        show_default=True,
        metavar="BACKEND",
        shell_complete=completions.backends,
        help=help_text,
    )


def run_argument(name: str = "run", metavar: str = "RUN") -> Decorator:
    """The directory of a run, which exists."""
    folder = click.Path(exists=True, file_okay=False, path_type=Path)
    return click.argument(name, metavar=metavar, type=folder, shell_complete=completions.runs)
