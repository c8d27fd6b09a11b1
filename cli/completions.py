"""What a shell completes: the values of options and arguments. Imported by every command, so light itself.

Files or folders are asked for before the names: bash forgets the names that it has heard before that.
"""

import click
from click.shell_completion import CompletionItem


def configs(context: click.Context, parameter: click.Parameter, given: str) -> list[CompletionItem]:
    """The packaged configs, and YAML files."""
    from portmoe.config.read import packaged_names

    names = [
        CompletionItem(name.removesuffix(".yaml")) for name in packaged_names() if name.startswith(given)
    ]
    return [CompletionItem(given, type="file"), *names]


def backends(context: click.Context, parameter: click.Parameter, given: str) -> list[CompletionItem]:
    """The registered backends."""
    from portmoe.accelerator.discovery import AUTO, registered_names

    return [CompletionItem(name) for name in (AUTO, *registered_names()) if name.startswith(given)]


def keys(context: click.Context, parameter: click.Parameter, given: str) -> list[CompletionItem]:
    """The keys of a config, each with its default; those of the config named before, where it can be read."""
    from portmoe.config import Config
    from portmoe.config.keys import walk
    from portmoe.config.messages import shorten
    from portmoe.config.read import load_config
    from portmoe.errors import PortmoeError

    if "=" in given:
        return []
    try:
        config = load_config(context.params.get("config_file") or "tiny_moe4")
    except PortmoeError:
        config = Config()
    entries = (entry for entry in walk(config) if entry.section is None and entry.path.startswith(given))
    return [CompletionItem(f"{entry.path}=", help=f"now {shorten(entry.value)}") for entry in entries]


def runs(context: click.Context, parameter: click.Parameter, given: str) -> list[CompletionItem]:
    """The run directories below runs/, and any other folder."""
    from portmoe.record.run_directory import CONFIG, RUNS

    found = sorted(str(path.parent) for path in RUNS.glob(f"*/{CONFIG}"))
    items = [CompletionItem(path) for path in found if path.startswith(given)]
    return [*folders(context, parameter, given), *items]


def folders(context: click.Context, parameter: click.Parameter, given: str) -> list[CompletionItem]:
    """Any folder."""
    return [CompletionItem(given, type="dir")]
