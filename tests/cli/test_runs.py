"""``portmoe runs``, and what a shell completes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import portmoe
from portmoe.cli.main import cli
from portmoe.cli.main import run as command
from portmoe.config.read import dump_config
from portmoe.record.lock import hold


def make(path, state=None, steps=0, age=0, total=10):
    """A run directory as a run of ``steps`` steps leaves it."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        dump_config(portmoe.load_config("tiny_moe4", [f"data.total_steps={total}"]))
    )
    if state:
        (path / "status.json").write_text(json.dumps({"state": state}))
    (path / "environment.json").write_text(json.dumps({"backend": "cpu"}))
    lines = "".join(json.dumps({"step": step, "loss": 1 / (step + 1)}) + "\n" for step in range(steps))
    (path / "metrics.jsonl").write_text(lines + '{"step": 99, "lo')
    os.utime(path / "metrics.jsonl", (1e9 - age, 1e9 - age))


def listed(capsys, *folders):
    assert command(["runs", *map(str, folders)]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_runs_are_listed_with_what_became_of_them_the_newest_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "old", "finished", 10, age=500)
    make(tmp_path / "runs" / "new", "stopped", 4)
    make(tmp_path / "runs" / "dead", "running", 2, age=100)
    make(tmp_path / "runs" / "alive", "running", 0, age=200)
    (tmp_path / "runs" / "no run").mkdir()
    lock = hold(tmp_path / "runs" / "alive")
    header, *rows = listed(capsys)
    lock.release()
    assert header == ["run", "state", "steps", "loss", "backend", "when"]
    assert [row[:5] for row in rows] == [
        ["runs/new", "stopped", "4/10", "0.2500", "cpu"],
        ["runs/dead", "killed", "2/10", "0.5000", "cpu"],
        ["runs/alive", "running", "0/10", "cpu", "2001-09-09"],
        ["runs/old", "finished", "10/10", "0.1000", "cpu"],
    ]
    assert hold(tmp_path / "runs" / "dead").release() is None  # looking has left no lock


def test_a_run_elsewhere_and_one_that_nobody_can_read(tmp_path, capsys):
    make(tmp_path / "elsewhere", None, 70_000)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("data: [")
    rows = {row[0]: row[1:4] for row in listed(capsys, tmp_path / "elsewhere", tmp_path / "broken")[1:]}
    assert rows[str(tmp_path / "elsewhere")] == ["unknown", "70000/10", "0.0000"]
    assert rows[str(tmp_path / "broken")][:2] == ["unknown", "0/?"]


def test_where_there_is_none_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(["runs"]) == 0
    assert "no run below runs" in capsys.readouterr().out


def completed(*words):
    variables = {
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_PORTMOE_COMPLETE": "bash_complete",
    }
    answer = CliRunner().invoke(cli, [], prog_name="portmoe", env=variables)
    return [line.partition(",")[2] for line in answer.output.splitlines()]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["portmoe", "tra"], ["train"]),
        (["portmoe", "train", "--config", "tiny_mo"], ["tiny_moe4"]),
        (["portmoe", "train", "--backend", "c"], ["cpu", "cuda"]),
        (["portmoe", "train", "--set", "moe.top"], ["moe.top_k="]),
        (["portmoe", "compare", "runs/a"], ["runs/abc", "runs/a d"]),
        (["portmoe", "completion", ""], ["bash", "zsh", "fish"]),
    ],
    ids=" ".join,
)
def test_a_shell_completes(words, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("abc", "a d", "other"):
        make(tmp_path / "runs" / name)
    assert set(found) <= set(completed(*words))
    assert "runs/other" not in completed(*words)


BASH = """
compopt() { :; }  # bash has it while a person completes only
eval "$("$1" completion bash)"
for typed in "train --config tiny_mo" "compare runs/a" "bisect --reference c"; do
    COMP_WORDS=(portmoe $typed) COMPREPLY=()
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _portmoe_completion "$1"
    echo "${COMPREPLY[@]}"
done
"""


def test_bash_itself_keeps_the_names_beside_files_and_folders(tmp_path):
    make(tmp_path / "runs" / "abc")
    line = ["bash", "--norc", "-c", BASH, "bash", Path(sys.executable).with_name("portmoe")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["tiny_moe4", "runs/abc", "cpu cuda"], done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_asks_portmoe(shell, capsys):
    assert command(["completion", shell]) == 0
    assert "_PORTMOE_COMPLETE=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "meant"), [("trian", "train"), ("compair", "compare"), ("checkenv", "check-env")]
)
def test_a_slip_is_answered_with_what_was_meant(typed, meant, capsys):
    assert command([typed]) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err
