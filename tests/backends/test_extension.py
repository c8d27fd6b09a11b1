"""intel-extension-for-pytorch by a stand-in: loaded where it goes with torch, and nowhere else."""

import sys

import pytest
import torch

import portmoe
from portmoe.accelerator import Probe
from portmoe.backends import extension

WITNESS = "import sys; sys.modules['witness'] = sys"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    def make(version, source=WITNESS):
        (tmp_path / f"{extension.MODULE}.py").write_text(source)
        versions = {extension.PACKAGE: version, "torch": "2.13.0+cpu"}
        monkeypatch.setattr(extension, "installed_version", versions.get)

    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (extension.MODULE, "witness"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    return make


@pytest.mark.parametrize(("version", "loaded"), [("2.13.1+cpu", True), ("2.8.0", False), (None, False)])
def test_the_cpu_is_opened_with_it_where_it_fits(installed, version, loaded):
    installed(version)
    assert portmoe.get_accelerator("cpu").open(0) == torch.device("cpu")
    assert ("witness" in sys.modules) is loaded


@pytest.mark.parametrize(("version", "problems"), [("2.13.1", 0), ("2.8.0", 1), (None, 0)])
def test_the_probe_shows_it(installed, version, problems):
    installed(version)
    found = portmoe.get_accelerator("cpu").device.probe()
    assert found.usable
    assert found.facts.get(extension.PACKAGE) == version
    assert [p.summary for p in found.problems] == [
        f"{extension.PACKAGE} 2.8.0 does not go with torch 2.13.0+cpu and is not used"
    ] * problems


def test_one_that_does_not_load_is_told_and_done_without(installed):
    installed("2.13.0", "raise ImportError('libintel-ext-pt-cpu.so')")
    probe = Probe()
    extension.load(probe)
    assert "libintel-ext-pt-cpu.so" in probe.problems[0].summary
    assert probe.usable
    assert portmoe.get_accelerator("cpu").open(0) == torch.device("cpu")
