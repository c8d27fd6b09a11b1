"""Options that several commands share."""

from collections.abc import Callable
from typing import Any

import click

from portmoe.cli import completions

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--config and --set, as ``config_file`` and ``overrides``."""
    name = click.option(
        "--config",
        "config_file",
        default="tiny_moe4.yaml",
        show_default=True,
        metavar="FILE",
        shell_complete=completions.configs,
        help="A YAML file, or the name of a packaged config (tiny_moe4, 7b_moe4).",
    )
    overrides = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        shell_complete=completions.keys,
        help="Override a key, as in --set moe.top_k=1. May be repeated.",
    )
    return name(overrides(function))


def backend_option(help_text: str) -> Decorator:
    """--backend, "auto" by default."""
    return click.option(
        "--backend", default="auto", show_default=True, shell_complete=completions.backends, help=help_text
    )
