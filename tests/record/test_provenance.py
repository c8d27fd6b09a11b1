"""What ``environment.json`` says, against what this process can see by other means."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import portmoe
from portmoe.record import provenance

HOME = Path(portmoe.__file__).parent.parent


def git(*words):
    return subprocess.run(
        ["git", *words], cwd=HOME, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def described(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("A_SECRET", "1234")
    return provenance.describe(portmoe.get_accelerator("cpu"), 5)


def test_what_a_run_ran_on(described):
    assert described["ranks"] == 5
    assert (described["backend"], described["collectives"], described["devices"]) == ("cpu", "gloo", 1)
    assert described["portmoe"] == portmoe.__version__
    assert described["python"] == platform.python_version()
    assert described["platform"].startswith("Linux" if platform.system() == "Linux" else platform.system())
    assert described["processor"]
    assert described["packages"] == {
        name: version(name) for name in ("torch", "numpy", "pydantic", "tensorboard")
    }


def test_only_the_variables_that_steer_a_run_are_kept(described):
    assert described["variables"]["OMP_NUM_THREADS"] == "3"
    assert not {"MKL_NUM_THREADS", "A_SECRET", "PATH"} & described["variables"].keys()


@pytest.mark.skipif(not (HOME / ".git").exists(), reason="not in a checkout")
def test_the_commit_of_a_checkout_is_named_in_full(described):
    dirty = "-dirty" if git("diff", "HEAD", "--name-only") else ""
    assert described["commit"] == git("rev-parse", "HEAD") + dirty


def test_outside_of_a_checkout_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(portmoe, "__file__", str(tmp_path / "portmoe" / "__init__.py"))
    assert provenance.describe(portmoe.get_accelerator("cpu"), 1)["commit"] is None


def test_a_broken_repository_has_no_commit(monkeypatch, tmp_path):
    (tmp_path / "portmoe").mkdir()
    (tmp_path / ".git").write_text("gitdir: nowhere\n")
    monkeypatch.setattr(portmoe, "__file__", str(tmp_path / "portmoe" / "__init__.py"))
    assert provenance.describe(portmoe.get_accelerator("cpu"), 1)["commit"] is None
