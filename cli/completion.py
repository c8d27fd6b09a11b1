"""``portmoe completion``."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_PORTMOE_COMPLETE"  # click's own, from the name of the program


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands, configs, backends, the keys of --set and run directories.

    bash: eval "$(portmoe completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc; fish: written into
    ~/.config/fish/completions/portmoe.fish.
    """
    maker = get_completion_class(shell)
    if maker is None:
        raise click.UsageError(f"this version of click completes nothing in {shell}; update click")
    click.echo(maker(context.find_root().command, {}, "portmoe", _VARIABLE).source())
