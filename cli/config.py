"""``portmoe config``: the resolved config."""

import click

from portmoe.cli.options import config_options
from portmoe.config_file import dump_config, load_config, no_effect_notes


@click.command()
@config_options
def config(name: str, overrides: tuple[str, ...]) -> None:
    """Print a config with every key resolved; the output is a config file again.

    Keys that are set but change nothing are reported on standard error.
    """
    resolved = load_config(name, overrides)
    click.echo(dump_config(resolved), nl=False)
    for note in no_effect_notes(resolved):
        click.echo(f"note: {note}", err=True)
