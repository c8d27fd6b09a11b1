"""``portmoe train`` as a script and a person meet it: first line, rows, exit codes, last words."""

import json
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from run_portmoe import arguments, environment, records
from zygote import portmoe, python, start_portmoe

from portmoe.cli.main import run as command
from portmoe.errors import BackendError, ConfigError, TrainingError
from portmoe.launch.interrupt import SIGNALS, exit_code

ROOT = Path(__file__).parents[2]

LOADED = """
import sys, click
said = click.echo
def echo(*text, **options):
    said(*text, **options)
    said(sorted({'torch', 'numpy', 'pydantic', 'rich'} & sys.modules.keys()), err=True)
click.echo = echo
from portmoe.cli.main import run
run(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "line",
    [
        ["train", "--config", "missing"],
        ["bisect", "--config", "missing"],
        ["report", ".", "--against", "missing"],
    ],
)
def test_what_is_started_is_said_before_anything_that_takes_time_is_loaded(line):
    done = subprocess.run([sys.executable, "-c", LOADED, *line], capture_output=True, text=True, timeout=60)
    first, loaded, *_ = done.stderr.splitlines()
    assert re.fullmatch(rf"portmoe \S+: {line[0]} .*missing.* \(loading torch takes seconds\)", first)
    assert loaded == "[]"


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"SLURM_PROCID": "3"}, {"PORTMOE_PARENT_PID": "1"}])
def test_of_several_ranks_one_speaks(variables, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command(["train", "--config", "missing"])
    assert "loading torch" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "data.total_steps=50"], "cannot be reached in 50 steps"),
        (["--set", "data.train_folder=somewhere"], "data.train_folder is set"),
    ],
)
def test_acceptance_that_cannot_be_reached_is_refused_where_it_is_required(options, said, capsys):
    assert command(["train", "--require-acceptance", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_dry_run_says_that_acceptance_cannot_be_reached(capsys):
    assert command(["train", "--dry-run", "--backend", "cpu", "--set", "data.total_steps=50"]) == 0
    assert "note: acceptance: cannot be reached in 50 steps" in capsys.readouterr().out


def test_a_run_that_is_not_accepted_ends_with_4_where_that_is_required(tmp_path):
    """And what it shows where its output is no terminal."""
    line = arguments(tmp_path / "ignored", data__total_steps=52, adam__lr=1e-9, lr_scheduler__eta_min=0.0)
    line += ["--require-acceptance", "--out", str(tmp_path / "run"), "--set", "log.every=20"]
    done = portmoe(line, environment())
    assert done.returncode == 4, done.stdout
    assert "Traceback" not in done.stdout
    assert "\x1b" not in done.stdout
    assert len(records(tmp_path / "run")) == 52
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"state": "finished"}
    rows = [row.split() for row in done.stdout.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == ["0", "19", "39", "51"]
    assert "error: the benchmark does not accept this run" in done.stdout
    for part in (
        "acceptance FAILED (loss < 0.325 at every step from 50 on): at 2 of 2 steps",
        f"tensorboard --logdir {tmp_path}/run/tensorboard",
        f"run        {tmp_path}/run",
        "finished after step 51 in ",
    ):
        assert part in done.stdout
    log = (tmp_path / "run" / "train.log").read_text()
    assert " step=51 loss=" in log
    assert "operations  " in log


def test_a_second_interrupt_says_what_is_saved_and_the_status_is_true(tmp_path):
    steps = {"data__micro_num": 150, "data__micro_bsz": 1, "ckpt__enable_save_ckpt": True}
    first = portmoe(arguments(tmp_path / "run", data__total_steps=1, **steps), environment())
    assert first.returncode == 0, first.stdout
    resumed = start_portmoe(arguments(tmp_path / "run", data__total_steps=50, **steps), environment())
    try:
        resumed.await_said(f"run      {tmp_path}/run, continued at step 1")
        resumed.send_signal(signal.SIGINT)
        resumed.await_said("SIGINT: finishing this step and saving; Ctrl-C again to abort")
        assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"state": "running"}
        resumed.send_signal(signal.SIGINT)
        said, _ = resumed.communicate(120)
    finally:
        resumed.kill()
    assert resumed.returncode == 130, said
    assert (
        f"aborted: the same command goes on from the checkpoint of step 1 in {tmp_path}/run/checkpoints"
        in said
    )
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"state": "aborted"}
    assert "Traceback" not in said


def test_the_exit_codes_in_the_documents_are_those_of_the_program():
    table = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs" / "running.md").read_text(), re.MULTILINE)
    documented = {int(code): when for code, when in table}
    errors = {error.exit_code for error in (ConfigError, BackendError, TrainingError)}
    assert set(documented) == {0, *errors, *map(exit_code, SIGNALS)}
    for number in SIGNALS:
        assert number.name in documented[exit_code(number)]


LIBRARY = """
import sys, json, portmoe
keys = json.loads(sys.argv[2])
config = portmoe.load_config("tiny_moe4", [f"run.directory={sys.argv[1]}/a", *keys])
outcome = portmoe.train(config, backend="cpu")
assert outcome.signal is None and outcome.accepted is None
assert str(outcome.directory) == sys.argv[1] + "/a"
records = portmoe.read_metrics(outcome.directory)
assert [record["step"] for record in records] == [0, 1], records
assert records == outcome.metrics == portmoe.read_metrics(outcome.directory / "metrics.jsonl")
import pandas
frame = pandas.read_json(outcome.directory / "metrics.jsonl", lines=True)
assert list(frame["loss"]) == [record["loss"] for record in records]
assert {"grad_norm/experts", "lr", "timestamp"} <= set(frame.columns)
other = portmoe.load_config("tiny_moe4", [f"run.directory={sys.argv[1]}/b", *keys])
again = portmoe.train(other, backend="cpu")
assert [r["loss"] for r in again.metrics] == [r["loss"] for r in records]
try:
    portmoe.read_metrics(sys.argv[1] + "/nowhere")
except portmoe.PortmoeError as error:
    assert "nowhere" in str(error)
print("all is well")
"""


def test_runs_are_made_and_read_as_a_library(tmp_path):
    line = arguments(tmp_path, data__total_steps=2)
    keys = [value for flag, value in pairwise(line) if flag == "--set"][1:]
    done = python(LIBRARY, environment(), str(tmp_path), json.dumps(keys))
    assert done.stdout.rstrip().endswith("all is well"), done.stdout


def test_the_public_names_are_those_of_the_page_about_them():
    import portmoe as package

    page = (ROOT / "docs" / "library.md").read_text()
    assert set(dir(package)) == set(package.__all__)
    for name in set(package.__all__) - {"__version__"}:
        assert f"`portmoe.{name}" in page, name
        assert getattr(package, name)
    assert (Path(package.__file__).parent / "py.typed").is_file()
