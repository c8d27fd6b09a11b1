"""The guide for a new vendor, followed to the letter in an empty folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from guides import EXAMPLE, FOLDER, LANGUAGES, blocks

GUIDES = {language: FOLDER / language / "new-vendor.md" for language in LANGUAGES}
CHECK_NORM = """
import json, torch
from portmoe.accelerator import get_accelerator
from portmoe.ops import OPERATIONS
from portmoe.verify.backend.conformance import check_operation
from portmoe_newvendor import runtime
backend = get_accelerator("newvendor")
own = [i for i in backend.ops.implementations() if i.name == "newvendor"]

def statuses(dtypes):
    checks = check_operation(OPERATIONS["rms_norm"], own, backend.open(0), 0, dtypes)
    return [c.status for c in checks if c.subject == "rms_norm.newvendor"]

healthy = statuses((torch.float32, torch.bfloat16))
right = runtime.rms_norm_backward
def wrong(*arguments):
    grad_x, grad_weight = right(*arguments)
    return 1.01 * grad_x, grad_weight
runtime.rms_norm_backward = wrong
print(json.dumps({"healthy": healthy, "faulty": statuses((torch.float32,))}))
"""
SLOW = ("portmoe validate", "sed ")  # the first lines of the blocks that are run by slow tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder after every command but the last ones, which validate the whole backend."""
    folder = tmp_path_factory.mktemp("newvendor")
    for block in blocks(GUIDES["en"]):
        if block.file:
            path = folder / block.file
            path.write_text(block.text, encoding="utf-8")  # its folder must have been made by a command
        elif block.language == "sh" and not block.text.startswith(SLOW):
            done = run(folder, ["bash", "-euo", "pipefail", "-c", block.text])
            assert done.returncode == 0, done.stdout + done.stderr
            with (folder / "output").open("a") as output:
                output.write(done.stdout)
    return folder


def run(folder, command):
    """Run ``command`` there; what pip installs goes to a folder inside, and nothing is downloaded."""
    site = folder / "site"
    environment = os.environ | {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": str(site),
        "PIP_TARGET": str(site),
        "PIP_UPGRADE": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this as: no isolation
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800, check=False
    )


def test_both_languages_hold_the_same_code():
    english, chinese = (blocks(GUIDES[language]) for language in LANGUAGES)
    assert len(english) > 10
    assert english == chinese


def test_the_example_is_what_the_guide_makes():
    made = {block.file: block.text for block in blocks(GUIDES["en"]) if block.file}
    kept = [p for p in EXAMPLE.rglob("*") if p.suffix in {".py", ".toml"} and "build" not in p.parts]
    assert made == {p.relative_to(EXAMPLE).as_posix(): p.read_text("utf-8") for p in kept}


@pytest.mark.timeout(600)
def test_the_guide_ends_with_a_backend_that_trains(folder):
    output = (folder / "output").read_text()
    assert "newvendor: can train on this machine" in output
    assert "rms_norm=newvendor" in (folder / "runs" / "newvendor" / "train.log").read_text()
    record = json.loads((folder / "runs" / "newvendor" / "ops.json").read_text())
    assert record["rms_norm"]["chosen"] == "newvendor"
    own, cpu = (
        [json.loads(line)["loss"] for line in (folder / "runs" / name / "metrics.jsonl").open()]
        for name in ("newvendor", "cpu")
    )
    assert len(own) == 10
    assert own == pytest.approx(cpu, rel=1e-5)


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_its_fused_operation_conforms_and_a_wrong_gradient_is_caught(folder):
    done = run(folder, [sys.executable, "-c", CHECK_NORM])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["healthy"]) >= 8
    assert set(found["healthy"]) == {"pass"}
    assert "fail" in found["faulty"]


@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_the_guides_last_commands_validate_break_find_and_repair_it(folder):
    last = [b.text for b in blocks(GUIDES["en"]) if b.language == "sh" and b.text.startswith(SLOW)]
    assert len(last) == 3
    runtime = folder / "portmoe_newvendor" / "runtime.py"
    right = runtime.read_text()
    said = []
    for commands in last:
        done = run(folder, ["bash", "-euo", "pipefail", "-c", commands])
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
        assert (runtime.read_text() == right) == (commands != last[1])
    agree = "every operation and the whole model agree"
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["passed"]
    assert report["backend"] == "newvendor"
    assert (folder / "report" / "report.html").exists()
    found, _, without_it = said[1].partition("exit code 4\n")
    assert "first wrong" in found
    assert "rms_norm.newvendor, backward" in found
    assert agree in without_it
    assert agree in said[2]
