"""``portmoe train``."""

import json
import os
import sys
from typing import TYPE_CHECKING

import click

from portmoe.cli.first_line import announce
from portmoe.cli.options import backend_option, config_options
from portmoe.cli.ranks import MOST_RANKS, launcher_option, nproc_option
from portmoe.errors import BackendError, ConfigError, TrainingError
from portmoe.launch.ranks import detect, machine_of

if TYPE_CHECKING:
    from portmoe.config import Config
    from portmoe.launch.nodes import Nodes


@click.command()
@config_options
@backend_option("The accelerator to train on.")
@click.option("--name", "run_name", metavar="NAME", help="Train in runs/NAME; the key run.name.")
@click.option("--out", metavar="DIR", help="Train in this directory; the key run.directory.")
@click.option(
    "--log",
    type=click.Choice(("table", "full")),
    help="What is shown of the steps: a table, or the benchmark's lines; the key log.terminal.",
)
@nproc_option()
@click.option(
    "--max-restarts",
    type=click.IntRange(0, MOST_RANKS),
    metavar="N",
    default=0,
    show_default=True,
    help="How often to start all processes again after a failure.",
)
@launcher_option("Who starts the processes; auto looks at the environment.")
@click.option(
    "--profile",
    is_flag=True,
    help="Write a trace of the first steps after warming up, and print where their time and memory go.",
)
@click.option(
    "--require-acceptance",
    is_flag=True,
    help="End with exit code 4 unless the benchmark accepts the run (its loss on the dummy data).",
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
    metavar="N",
    default=None,
    help="Number of ranks the dry run is for.  [default: --nproc]",
)
def train(
    config_file: str,
    overrides: tuple[str, ...],
    backend: str,
    run_name: str | None,
    out: str | None,
    log: str | None,
    nproc: int,
    max_restarts: int,
    launcher: str,
    profile: bool,
    twin: int | None,
    require_acceptance: bool,
    dry_run: bool,
    world_size: int | None,
) -> None:
    """Train the model of a config; without options, the tiny one on the best backend found.

    A run lives in runs/NAME. The same command again goes on with it where it was stopped; once it is
    finished, or where the config or the data differ, it begins another in runs/NAME-2. `portmoe runs` lists
    them.
    """
    if world_size is not None and not dry_run:
        raise click.UsageError("--world-size is for --dry-run only; use --nproc to start processes")
    if profile and dry_run:
        raise click.UsageError("--profile needs real steps; leave --dry-run out")
    if run_name and out:
        raise click.UsageError("--name and --out both say where the run lives; give one of the two")
    announce(f"{'dry run of' if dry_run else 'train'} {config_file} on {backend}")
    overrides += tuple(
        f"{key}={json.dumps(value)}"
        for key, value in (("run.name", run_name), ("run.directory", out), ("log.terminal", log))
        if value is not None
    )
    from portmoe.accelerator.discovery import AUTO, find, prepare
    from portmoe.config.read import config_name, load_config

    if twin is not None:
        overrides = _of_twin(config_file, overrides, twin)
    config = load_config(config_file, overrides)
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
    _check(config, config_file, world_size or ranks, require_acceptance)
    prepare(backend)
    if dry_run:
        from portmoe.planning.dry_run import dry_run as describe

        click.echo(describe(config, config_file, backend, world_size or nproc))
        return
    if nproc > 1 or machine is not None:
        from portmoe.launch.spawn import spawn
        from portmoe.record.origin import COMMAND, command

        os.environ[COMMAND] = command()
        settings = [part for override in overrides for part in ("--set", override)]
        launched = "nodes" if machine else "torchrun"
        argv = ["train", "--config", config_file, *settings, "--backend", backend, "--launcher", launched]
        argv += ["--profile"] if profile else []
        argv += ["--require-acceptance"] if require_acceptance else []
        sys.exit(spawn(nproc, argv, max_restarts, machine=machine))
    from portmoe.launch.interrupt import exit_code
    from portmoe.training.run import train as start

    called = config_name(config_file) + (f"-twin{config.run.twin}" if config.run.twin else "")
    outcome = start(config, called, backend, launcher, profile)
    if outcome.signal is not None:
        sys.exit(exit_code(outcome.signal))
    if require_acceptance and outcome.accepted is False:
        raise TrainingError("the benchmark does not accept this run (--require-acceptance)")


def _of_twin(config_file: str, overrides: tuple[str, ...], twin: int) -> tuple[str, ...]:
    """The overrides with those of a twin, which the command of its run makes beside that run's directory."""
    from portmoe.config.read import load_config

    run = load_config(config_file, overrides).run
    places = (("run.directory", run.directory), ("run.name", run.name))
    beside = (f"{key}={json.dumps(f'{place}-twin{twin}')}" for key, place in places if place is not None)
    return (*overrides, f"run.twin={twin}", *beside)


def _check(config: "Config", config_file: str, ranks: int, require_acceptance: bool) -> None:
    """Refuse what can be told from the config alone, before torch is imported."""
    from portmoe.config.checks import of_the_data
    from portmoe.parallel.layout import Layout
    from portmoe.record import acceptance
    from portmoe.training.engines import require_engine

    if problems := list(of_the_data(config)):
        raise ConfigError(f"{config_file}: {problems[0]}")
    if require_acceptance and not acceptance.applies(config):
        raise ConfigError(
            "--require-acceptance is about the benchmark's dummy data, and data.train_folder is set; leave "
            "one of the two out"
        )
    if require_acceptance and (problem := acceptance.out_of_reach(config)):
        raise ConfigError(f"--require-acceptance: {problem}")
    Layout.plan(config, ranks)
    require_engine(config)


def _processes(machine: "Nodes", nproc: int) -> int:
    """How many ranks each machine has."""
    if nproc > 1 and machine.processes not in (None, nproc):
        raise click.UsageError(
            f"--nproc {nproc} and NPROC_PER_NODE={machine.processes} in the environment disagree; "
            "give one of them"
        )
    return machine.processes or nproc


def _started(launcher: str) -> int:
    """How many ranks there are, with this one; refuses at once what they would wait for in vain."""
    from portmoe.launch.address import with_known_address

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
