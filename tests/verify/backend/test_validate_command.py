"""``portmoe validate`` on backends made for the test: a right one, wrong ones, and one that is not there."""

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch

from portmoe.accelerator import get_accelerator
from portmoe.cli.main import run as portmoe_here
from portmoe.result import Result
from portmoe.verify.backend import reports
from portmoe.verify.backend import validate as module
from portmoe.verify.backend.cases import SHAPES
from portmoe.verify.backend.collectives import TRIALS, check_collectives
from portmoe.verify.backend.pool import check_memory
from portmoe.verify.backend.validate import Selection
from portmoe.verify.runs.training_run import check_training, reference

# A CPU backend under another name whose one part can be replaced.
BACKEND = """
import dataclasses, torch
from portmoe.backends.cpu import accelerator as cpu
from portmoe.backends.torch import ops as torch_ops
from portmoe.accelerator import Operations
from portmoe.ops.operation import Implementation

class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)
    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01

class Planted(Operations):
    def implementations(self):
        mine = Implementation("expert_ffn", "wrong", wrong)
        return [mine, *torch_ops.ALL] if WRONG_GRADIENT else torch_ops.ALL

def wrong(x, w1, w3, w2):
    from portmoe import ops
    return ops.expert_ffn(x, w1, Scaled.apply(w3), w2)

def accelerator():
    if WRONG_AVERAGE:
        from portmoe.model.precision import local_tensor
        from portmoe.training.optimizer import Optimizer
        right = Optimizer.gradient_norms
        def summed(self, scale):
            for p in self.parameters.values():
                local_tensor(p.grad).mul_(4)
            return right(self, scale)
        Optimizer.gradient_norms = summed
    return dataclasses.replace(cpu(), name="planted", ops=Planted())
"""


@pytest.fixture
def plant(install, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def place(**wrong):
        flags = {"WRONG_GRADIENT": False, "WRONG_AVERAGE": False} | wrong
        source = "".join(f"{name} = {value}\n" for name, value in flags.items()) + BACKEND
        install("planted_backend", source, "portmoe.backends", "planted")

    return place


def failed(checks):
    return {check.name for check in checks if check.status == "fail"}


def test_the_cpu_trains_as_recorded(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    checks, curves = check_training("cpu", timeout=240)
    assert not failed(checks), checks
    assert len(checks) > 10
    assert curves[0].label == "loss"
    assert len(curves[0].measured) == len(reference()) == 20


def test_a_gradient_that_is_1_percent_off_shows_in_the_norms_of_the_run(plant):
    plant(WRONG_GRADIENT=True)
    checks, _ = check_training("planted", timeout=240)
    assert "gradient norm, experts" in failed(checks)


def test_a_wrong_average_which_no_operation_shows_is_caught_by_the_run(plant):
    plant(WRONG_AVERAGE=True)
    checks, _ = check_training("planted", timeout=240)
    assert {"gradient norm, default", "gradient norm, fp32, layer 0"} <= failed(checks)


def test_a_run_that_ends_early_fails():
    checks, curves = check_training("no-such-backend", timeout=120)
    assert failed(checks) == {"completes"}
    assert not curves


def test_collectives_of_the_cpu():
    checks = list(check_collectives("cpu", get_accelerator("cpu"), timeout=240))
    assert {check.name for check in checks} == set(TRIALS)
    assert not failed(checks), checks


def test_collectives_that_never_start_fail_every_trial():
    checks = list(check_collectives("no-such-backend", get_accelerator("cpu"), timeout=120))
    assert failed(checks) == set(TRIALS)


def test_a_pool_that_forgets_its_buffers_fails():
    accelerator = get_accelerator("cpu")
    device = accelerator.open(0)
    assert not failed(check_memory(accelerator, device))
    accelerator.memory.pool.give = lambda buffer: None
    assert failed(check_memory(accelerator, device)) == {"reuse", "steady state"}


def portmoe(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "portmoe", "validate", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "code"), [(False, 0), (True, 4)])
def test_the_whole_command(plant, tmp_path, wrong, code):
    plant(WRONG_GRADIENT=wrong)
    done = portmoe("--backend", "planted", "--out", str(tmp_path / "out"))
    assert done.returncode == code, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["passed"] is not wrong
    subjects = {check["subject"] for check in report["checks"] if check["status"] == "fail"}
    assert subjects == ({"expert_ffn.wrong", "reference run"} if wrong else set())


@pytest.mark.parametrize(("name", "code"), [("npu", 3), ("no-such-backend", 2)])
def test_a_backend_that_is_not_usable(name, code):
    done = portmoe("--backend", name)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_in_a_hurry_two_shapes_are_tried_and_the_rest_is_said_to_be_left_out(monkeypatch):
    tried = []

    def check_operation(operation, mine, device, seed, dtypes, shapes):
        tried.extend(shapes)
        return []

    monkeypatch.setattr(module, "check_operation", check_operation)
    monkeypatch.setattr(module, "check_collectives", lambda *args: pytest.fail("started processes"))
    report = module.validate("cpu", Selection(quick=True), lambda line: None)
    assert {SHAPES[name].dropless for name in tried} == {True, False}
    left_out = {check.part: check.detail for check in report.checks if check.status == "skip"}
    assert left_out == {"collectives": "not with --quick", "training": "not with --quick"}
    assert {check.part for check in report.checks if check.status == "pass"} == {"memory"}


def checked(status="pass", **more):
    return Result(status, "values, float32", subject="rotary.fast", part="operations", **more)


def test_lines_tell_how_far_it_is_and_failures_come_at_once(monkeypatch):
    lines, seen, shown = [], [], []

    def check_operation(operation, *_):
        yield checked(compiling=2.0)
        if operation.name == "rotary":
            yield checked("fail", detail="odd: output is off")
            seen.extend(lines)  # before the group ends

    monkeypatch.setattr(module, "check_operation", check_operation)
    selection = Selection(only=["rms_norm", "rotary", "memory"], dtypes=[torch.float32])
    report = module.validate("cpu", selection, lines.append, lambda *now: shown.append(now))
    assert shown[:3] == [("rms_norm", 0, 3), ("rotary.fast", 0, 3), ("rotary", 1, 3)]
    assert shown[-1] == ("", 3, 3)
    assert any(line.startswith("FAIL rotary.fast: values, float32: odd") for line in seen)
    first, rms, _, rotary, memory = lines
    assert first == "3 groups of checks; now rms_norm"
    assert re.fullmatch(
        r"\[1/3\] rms_norm: 1 passed, 0 failed in .* s, 2\.0 s of it compiling; 0 failed so far, after .* s; "
        "now rotary",
        rms,
    )
    assert "[2/3] rotary: 1 passed, 1 failed" in rotary
    assert "1 failed so far" in memory
    assert "now" not in memory
    left = {c.subject: c.detail for c in report.checks if c.status == "skip"}
    assert left["attention"] == left["training"] == "not with --only"


def test_an_interrupt_leaves_the_report_of_what_was_done(monkeypatch, tmp_path, capsys):
    def check_operation(operation, *_):
        yield checked()
        if operation.name == "rotary":
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "check_operation", check_operation)
    assert portmoe_here(["validate", "--backend", "cpu", "--out", str(tmp_path)]) == 130
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"] == "rotary"
    assert not report["passed"]
    left = {c["subject"] for c in report["checks"] if c["detail"] == "interrupted"}
    assert {"rotary", "attention", "memory", "training"} <= left
    assert "linear" not in left
    assert "interrupted in rotary" in capsys.readouterr().out


def test_warnings_of_libraries_are_counted_and_not_shown(monkeypatch, recwarn):
    def check_operation(operation, *_):
        for number in range(20):
            warnings.warn(f"not deterministic (Triggered internally at x.cpp:{number})", stacklevel=1)
        yield checked()

    monkeypatch.setattr(module, "check_operation", check_operation)
    report = module.validate("cpu", Selection(only=["rotary"]), lambda line: None)
    assert dict(report.warnings) == {"not deterministic": 20}
    assert "warned 20 times: not deterministic" in reports.table(report)
    assert not recwarn.list


@pytest.mark.parametrize("wrong", [["--only", "rotary,rotery"], ["--dtype", "float8"], ["--dtype", ","]])
def test_what_is_nothing_to_check_is_refused(wrong, capsys):
    assert portmoe_here(["validate", "--backend", "cpu", *wrong]) == 2
    assert "rotery" in (said := capsys.readouterr().err) or "float32" in said
