"""``portmoe check-env``."""

import json
import sys
from pathlib import Path

import click

from portmoe.cli.first_line import announce
from portmoe.cli.options import backend_option
from portmoe.errors import BackendError, written_to

COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}


@click.command("check-env")
@backend_option("The backend to check; auto checks all that are installed.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    default=None,
    help="An HTML page of the report.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1, 3600),
    metavar="SECONDS",
    default=120,
    show_default=True,
    help="How long one check may take before it counts as failed.",
)
def check_env(backend: str, as_json: bool, out: Path | None, timeout: float) -> None:
    """Check what this machine can train on, and say how to repair what cannot.

    Ends with exit code 3 if the backend asked for (for auto: every backend) cannot train.
    """
    announce(f"check what can train here, {backend}")
    from portmoe.record.progress import Progress
    from portmoe.record.terminal import terminal
    from portmoe.verify.machine.page import html
    from portmoe.verify.machine.survey import survey
    from portmoe.verify.machine.text import render

    with Progress(terminal(sys.stderr)) as progress:
        report = survey(backend, timeout, lambda what: progress(f"checking {what}"))
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        click.echo(render(report, lambda level, tag: click.style(tag, fg=COLOURS[level])))
        if report.can_train:
            click.echo(f"next: portmoe validate --backend {report.auto}")
    if out is not None:
        with written_to(out):
            out.write_text(html(report), encoding="utf-8")
    if not report.can_train:
        sys.exit(BackendError.exit_code)
