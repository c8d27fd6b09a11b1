"""``portmoe config``: the resolved config, and configs of other programs."""

from pathlib import Path

import click

from portmoe.cli.options import config_options
from portmoe.config import Config
from portmoe.config.messages import shorten
from portmoe.config.read import default_model, dump_config, load_config, no_effect_notes
from portmoe.errors import ConfigError


@click.group(invoke_without_command=True)
@config_options
@click.pass_context
def config(context: click.Context, config_file: str, overrides: tuple[str, ...]) -> None:
    """Print a config with every key resolved; the output is a config file again.

    Keys that are set but change nothing are reported on standard error.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    resolved = load_config(config_file, overrides)
    click.echo(dump_config(resolved), nl=False)
    _show_notes(resolved)


@config.command("import", short_help="Turn a config of InternEvo or XTuner into YAML.")
@click.argument("source", metavar="FILE.py")
@click.option(
    "-o",
    "--out",
    "--output",
    "output",
    default=None,
    metavar="FILE.yaml",
    help="Write here instead of printing.",
)
@click.option("--force", is_flag=True, help="Overwrite the output file.")
def import_(source: str, output: str | None, force: bool) -> None:
    """Turn a config of InternEvo or XTuner into a YAML config, without executing it.

    Literals, arithmetic and names assigned before are read; anything else is named with its line. What
    could not be carried over is listed on standard error and on top of the result.
    """
    from portmoe.config.importers import import_config

    imported = import_config(source)
    resolved = imported.config
    if output is None:
        click.echo(imported.yaml(), nl=False)
    else:
        _write(output, imported.yaml(), force)
        click.echo(f"written: {output}", err=True)
    for item in imported.left_out:
        click.echo(f"not carried over: {item}", err=True)
    if imported.model_may_differ:
        click.echo("warning: keys of the model were left out: this may be another model", err=True)
    if imported.defaults:
        click.echo(
            f"note: not in the file, so {imported.program}'s defaults hold, and portmoe's where it has none: "
            f"{', '.join(imported.defaults)}",
            err=True,
        )
    for note in imported.notes:
        click.echo(f"note: {note}", err=True)
    _show_notes(resolved)


def _refuse_options(context: click.Context) -> None:
    given = click.core.ParameterSource.COMMANDLINE
    if given in (context.get_parameter_source(name) for name in ("config_file", "overrides")):
        raise click.UsageError(f"--config and --set do not go with {context.invoked_subcommand!r}")


def _show_notes(config: Config) -> None:
    for note in (*default_model(config), *no_effect_notes(config)):
        click.echo(f"note: {note}", err=True)


def _write(output: str, text: str, force: bool) -> None:
    try:
        with Path(output).open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"--out {shorten(output)} exists; add --force to overwrite it, or give another name"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out {shorten(output)} cannot be written: {reason}") from None
