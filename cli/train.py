"""``portmoe train``."""

import json
import os
import sys

import click

from portmoe.accelerator.discovery import AUTO, find, prepare
from portmoe.cli.options import config_options
from portmoe.config.checks import of_the_data
from portmoe.config.read import config_name, load_config
from portmoe.errors import BackendError, ConfigError
from portmoe.launch.address import with_known_address
from portmoe.launch.interrupt import exit_code
from portmoe.launch.nodes import Nodes
from portmoe.launch.ranks import LAUNCHERS, detect, machine_of
from portmoe.parallel.layout import Layout
from portmoe.training.engines import require_engine

MOST_RANKS = 2**20


@click.command()
@config_options
@click.option("--backend", default=AUTO, show_default=True, help="The accelerator to train on.")
@click.option(
    "--nproc",
    type=click.IntRange(1, MOST_RANKS),
    default=1,
    show_default=True,
    help="Processes on this machine.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(0, MOST_RANKS),
    default=0,
    show_default=True,
    help="How often to start all processes again after a failure.",
)
@click.option(
    "--launcher",
    type=click.Choice(LAUNCHERS),
    default="auto",
    show_default=True,
    help="Who starts the processes; auto looks at the environment.",
)
@click.option(
    "--profile",
    is_flag=True,
    help="Write a trace of the first steps after warming up, and print where their time and memory go.",
)
@click.option(
    "--twin",
    type=click.IntRange(1, 2**31),
    default=None,
    metavar="N",
    help="Train the N-th twin: the same run, in a directory of its own, with every weight moved by one unit "
    "in its last place. compare measures by twins how far two right runs part.",
)
@click.option("--dry-run", is_flag=True, help="Print what training takes, without training.")
@click.option(
    "--world-size",
    type=click.IntRange(1, MOST_RANKS),
    default=None,
    help="Number of ranks the dry run is for.  [default: --nproc]",
)
def train(
    name: str,
    overrides: tuple[str, ...],
    backend: str,
    nproc: int,
    max_restarts: int,
    launcher: str,
    profile: bool,
    twin: int | None,
    dry_run: bool,
    world_size: int | None,
) -> None:
    """Train the model of a config; without options, the tiny one on the best backend found."""
    if world_size is not None and not dry_run:
        raise click.UsageError("--world-size is for --dry-run only; use --nproc to start processes")
    if profile and dry_run:
        raise click.UsageError("--profile needs real steps; leave --dry-run out")
    if twin is not None:
        overrides = _of_twin(name, overrides, twin)
    config = load_config(name, overrides)
    if backend != AUTO:
        find(backend)
    machine = None if dry_run else machine_of(launcher)
    if machine is not None:
        nproc = _processes(machine, nproc)
        ranks = machine.count * nproc
    else:
        ranks = nproc if dry_run or nproc > 1 else _started(launcher)
        if nproc > 1 and not dry_run:
            _refuse_inside_of_a_launch(nproc, launcher)
    if problems := list(of_the_data(config)):
        raise ConfigError(f"{name}: {problems[0]}")
    Layout.plan(config, world_size or ranks)
    require_engine(config)
    prepare(backend)
    if dry_run:
        from portmoe.planning.dry_run import dry_run as describe

        click.echo(describe(config, name, backend, world_size or nproc))
        return
    if nproc > 1 or machine is not None:
        from portmoe.launch.spawn import spawn

        settings = [part for override in overrides for part in ("--set", override)]
        argv = [
            "train",
            "--config",
            name,
            *settings,
            "--backend",
            backend,
            "--launcher",
            "nodes" if machine else "torchrun",
        ]
        argv += ["--profile"] if profile else []
        sys.exit(spawn(nproc, argv, max_restarts, machine=machine))
    from portmoe.training.run import train as start

    called = config_name(name) + (f"-twin{config.run.twin}" if config.run.twin else "")
    stopped_by = start(config, called, backend, launcher, profile)
    if stopped_by is not None:
        sys.exit(exit_code(stopped_by))


def _of_twin(name: str, overrides: tuple[str, ...], twin: int) -> tuple[str, ...]:
    """The overrides with those of a twin, which the command of its run makes beside that run's directory."""
    directory = load_config(name, overrides).run.directory
    beside = () if directory is None else (f"run.directory={json.dumps(f'{directory}-twin{twin}')}",)
    return (*overrides, f"run.twin={twin}", *beside)


def _processes(machine: Nodes, nproc: int) -> int:
    """How many ranks each machine has."""
    if nproc > 1 and machine.processes not in (None, nproc):
        raise click.UsageError(
            f"--nproc {nproc} and NPROC_PER_NODE={machine.processes} in the environment disagree; "
            "give one of them"
        )
    return machine.processes or nproc


def _started(launcher: str) -> int:
    """How many ranks there are, with this one; refuses at once what they would wait for in vain."""
    ranks = detect(launcher)
    if ranks.world_size > 1:
        with_known_address(ranks, os.environ)
    return ranks.world_size


def _refuse_inside_of_a_launch(nproc: int, launcher: str) -> None:
    """Each of the processes that a launcher started would start ``nproc`` more and make a run of its own."""
    try:
        started = detect(launcher).world_size
    except BackendError:  # started by none, as in the shell of a batch script
        return
    if started > 1:
        raise click.UsageError(
            f"--nproc {nproc} in one of {started} processes that a launcher has started would make {started} "
            "runs; leave --nproc out, or use --launcher local"
        )
