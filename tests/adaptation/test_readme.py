"""What the README and its Chinese counterpart claim: commands parse, links lead somewhere, both are one."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from guides import ROOT, blocks, commands
from test_guides import parsed_command

from portmoe.verify.bring_up.__main__ import bring_up

READMES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh.md"}
PAGES = [*READMES.values(), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").rglob("*/*.md"))]
SETUP = "python3 -m venv "
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
CODE = re.compile(r"`([^`]*)`")
OURS = [READMES["en"], *sorted((ROOT / "docs").glob("*.md"))]
SYNOPSIS = re.compile(r"\[--|\bRUN\b")  # of a command, no command
COMMANDS = sorted(
    {
        command
        for path in OURS
        for command in commands(path)
        if re.search(r"(^|\s)portmoe\s", command) and not SYNOPSIS.search(command)
    }
)


def sh(path):
    return [block.text for block in blocks(path) if block.language == "sh"]


def test_both_languages_have_the_same_commands_and_the_same_tables():
    assert len(sh(READMES["en"])) > 8
    assert sh(READMES["en"]) == sh(READMES["zh"])
    tables = [
        [sorted(CODE.findall(line)) for line in path.read_text("utf-8").splitlines() if line.startswith("|")]
        for path in READMES.values()
    ]
    assert len(tables[0]) > 10
    assert tables[0] == tables[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_parse(command, tmp_path, monkeypatch):
    (tmp_path / "my.yaml").write_text("model_type: INTERNLM_MoE\n")
    for folder in ("FOLDER", "DATA"):
        (tmp_path / folder).mkdir()
    parsed_command(command, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_what_is_there(path):
    for link in LINK.findall(path.read_text("utf-8")):
        assert (path.parent / link).exists(), link
    if path.parent.name == "zh":
        assert READMES["en"] not in [
            (path.parent / link).resolve() for link in LINK.findall(path.read_text())
        ]


def test_the_bring_up_command_parses():
    (command,) = [line for line in commands(READMES["en"]) if "verify.bring_up" in line]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "portmoe.verify.bring_up"]
    assert bring_up.make_context("bring_up", words[3:]).params["backend"] == "cpu"


def test_the_two_commands_of_the_start_come_first_and_are_complete():
    first, second = sh(READMES["en"])[:2]
    assert first.startswith(SETUP)
    assert first.endswith(" && .venv/bin/portmoe train\n")
    assert second.startswith(SETUP)
    assert second.endswith("pytest\n")
    for command in (first, second):
        assert "-c constraints.txt" in command
    assert (ROOT / "constraints.txt").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_of_a_bring_up_run_one_after_the_other(tmp_path):
    """The block as it stands there, each command with its exit code."""
    (block,) = [text for text in sh(READMES["en"]) if "portmoe replay" in text]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("machine.html", "report/report.html", "bisect.html", "replay/replay.html", "compare.html"):
        assert "✓ passed" in (tmp_path / page).read_text(encoding="utf-8"), page
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/port/metrics.jsonl").open()]
    assert steps == list(range(60))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_blocks_are_shell(path):
    for text in sh(path):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
