"""The source distribution holds all a checkout holds, and the wheel made from it works without either."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta as backend; import sys; print(backend.build_{}(sys.argv[1]))"
# Run away from the checkout: data files of every kind, the command, and a page.
USE = """
import portmoe, sys
assert portmoe.__file__.startswith(sys.argv[1]), portmoe.__file__
from portmoe.cli.main import run
assert run(["config", "--config", "7b_moe4"]) == 0
from portmoe.record.page import page
assert "@media print" in page("t", "pass", "Fine.", [], [])
from portmoe.verify.runs import training_run
from portmoe.backends.cpu import compiler
from portmoe.configs.conversations import make
for name, text in make.files().items():
    assert (make.HERE / name).read_text(encoding="utf-8") == text
assert (make.HERE / make.TOKENIZER / "tokenizer.json").is_file()
"""


def python(folder, *arguments, **variables):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources():
    """The files of the checkout, those git does not know yet included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    return [name for name in names if not name.startswith((".ci/", ".git"))]


@pytest.mark.slow
def test_the_source_distribution_is_complete_and_its_wheel_works(tmp_path):
    names = sources()
    copy, unpacked, installed = (tmp_path / name for name in ("copy", "unpacked", "installed"))
    for name in names:  # without what former builds left in the checkout
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    python(copy, "-c", BUILD.format("sdist"), str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {member.name.partition("/")[2] for member in packed.getmembers() if member.isfile()}
        packed.extractall(unpacked, filter="data")
    assert set(names) <= held
    assert not [name for name in held - set(names) if "egg-info" not in name and "/" in name]

    (home,) = unpacked.iterdir()
    python(home, "-c", BUILD.format("wheel"), str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        top = {name.partition("/")[0].partition("-")[0] for name in packed.namelist()}
        (metadata,) = [name for name in packed.namelist() if name.endswith("/METADATA")]
        described = packed.read(metadata).decode()
        packed.extractall(installed)
    assert top == {"portmoe"}
    for field in ("Classifier: ", "Keywords: ", "Project-URL: ", "License-Expression: Apache-2.0"):
        assert f"\n{field}" in described
    python(tmp_path, "-c", USE, str(installed), PYTHONPATH=str(installed))
