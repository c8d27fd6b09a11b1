"""Options that several commands share."""

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--config and --set."""
    name = click.option(
        "--config",
        "name",
        default="tiny_moe4.yaml",
        show_default=True,
        metavar="FILE",
        help="A YAML file, or the name of a packaged config (tiny_moe4, 7b_moe4).",
    )
    overrides = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a key, as in --set moe.top_k=1. May be repeated.",
    )
    return name(overrides(function))
