"""Backends that misbehave in a process of their own must become findings, not take the survey down."""

import os
from importlib.metadata import entry_points

import pytest

from portmoe.accelerator import discovery
from portmoe.verify.machine import survey as survey_module
from portmoe.verify.machine.survey import survey
from portmoe.verify.machine.text import render

BACKEND = """
import os, signal
from dataclasses import replace

def accelerator():
    from portmoe.accelerator import Probe
    from portmoe.backends import cpu
    from portmoe.backends.cpu.device import CpuDevice

    class Toy(CpuDevice):
        {body}

    return replace(cpu.accelerator(), name="{name}", device=Toy(), priority={priority})
"""

BODIES = {
    "crashes": "def probe(self): os.kill(os.getpid(), signal.SIGSEGV)",
    "raises": "def probe(self): raise ValueError('the bus is on fire')",
    "cannot_open": "shared = False\n        def open(self, local_rank): raise RuntimeError('device is busy')",
    "absent": "def probe(self):\n            p = Probe(); p.fail('no toy card', 'buy one'); return p",
}


@pytest.fixture
def toys(install, monkeypatch):
    """Only the misbehaving backends and the CPU are registered."""
    for priority, (name, body) in enumerate(BODIES.items(), start=20):
        source = BACKEND.format(name=name, body=body, priority=priority)
        install(f"toy_{name}", source, discovery.GROUP, name)
    points = {point.name: point for point in entry_points(group=discovery.GROUP)}
    monkeypatch.setattr(survey_module, "registered", lambda: {n: points[n] for n in (*BODIES, "cpu")})


def test_each_misbehaviour_is_a_finding_and_the_others_are_still_checked(toys):
    report = survey("auto", timeout=100)
    backends = {backend.name: backend for backend in report.backends}
    assert backends.keys() == {*BODIES, "cpu"}
    assert report.auto == "cpu"
    assert report.can_train
    assert [name for name, backend in backends.items() if backend.can_train] == ["cpu"]

    def failures(name):
        return [f for f in backends[name].findings if f.status != "pass"]

    assert "ended by SIGSEGV" in failures("crashes")[0].detail
    assert "ValueError: the bus is on fire" in failures("raises")[0].detail
    assert "RuntimeError: device is busy" in failures("cannot_open")[0].detail
    (absent,) = failures("absent")
    assert (absent.status, absent.detail, absent.fix) == ("warn", "no toy card", "buy one")
    for name in BODIES:
        assert all(finding.fix for finding in failures(name))

    cpu = {finding.name: finding for finding in backends["cpu"].findings}
    assert cpu["collectives"].status == "pass"
    assert "2 ranks" in cpu["collectives"].detail
    for dtype in ("float32", "bfloat16", "float16"):
        assert cpu[dtype].status == "pass"
    assert backends["cpu"].operations["attention"]["chosen"]

    text = render(report)
    assert text.index("\ncpu: can train") < text.index("\nabsent: cannot train")
    assert "[WARN] probe  no toy card\n" in text
    assert "fix: buy one\n" in text
    assert text.endswith("`portmoe train` takes cpu, unless --backend names another.")


def test_a_plug_in_that_crashes_torch_is_named(toys, install, monkeypatch):
    source = "import os; os.kill(os.getpid(), 11)"
    install("toy_plugin", source, "torch.backends", "toy_plugin", "autoload")
    monkeypatch.setattr(survey_module, "_try_out", lambda *_: None)  # tested with the healthy ones
    report = survey("cpu", timeout=100)
    broken, sound = (finding for finding in report.findings if finding.name == "torch")
    assert (broken.status, sound.status) == ("fail", "pass")
    assert "ended by SIGSEGV while it loads its plug-ins: toy_plugin 1.5" in broken.detail
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in broken.fix
    assert not report.can_train


def test_the_backend_asked_for_fails_where_it_is_absent(toys, monkeypatch):
    monkeypatch.setattr(discovery, "registered", survey_module.registered)
    report = survey("absent", timeout=100)
    assert not report.can_train
    assert [(f.status, f.name) for f in report.backends[0].findings] == [("fail", "probe")]
    assert "absent: cannot train on this machine" in render(report)
    assert os.environ.get("PORTMOE_REPORT") is None


def test_a_torch_that_cannot_be_imported_at_all_leaves_no_backend(toys, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: file too short')", encoding="utf-8")
    report = survey("cpu", timeout=100)
    assert not report.can_train
    assert "OSError: libtorch_cpu.so: file too short" in report.findings[-1].detail
    assert "pip install" in report.findings[-1].fix
