"""Measured timings on disk: found again for the same case only, and never in the way."""

import json
import os
from dataclasses import replace

import pytest
import torch
from agreement import workload

from portmoe.config import Config
from portmoe.config.sections.execution import OpsConfig
from portmoe.ops import Implementation, Operation, choose, measure
from portmoe.ops.operation import Sample, rounding
from portmoe.ops.timings import Timings, cache_file

SHAPES = workload()
MEASURE = Config(ops=OpsConfig(select="measure"))


class Counting:
    """x + x, counting its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + x


def operation(reference):
    return Operation("swiglu", reference, lambda w, g: [Sample("one", (torch.ones(w.tokens),))], rounding(1))


def run(path, *, device="chip", shapes=SHAPES, names=("a", "b")):
    """One process's choice: (calls of each implementation, what was logged, the record)."""
    log, functions = [], {name: Counting() for name in names}
    offered = [Implementation("swiglu", name, function) for name, function in functions.items()]
    timings = Timings.load(device, path, log.append)
    table = choose({"swiglu": operation(Counting())}, offered, shapes, MEASURE, log.append, timings)
    timings.save(log.append)
    return [f.calls for f in functions.values()], log, table.record()["swiglu"]


def test_the_second_run_measures_nothing_and_chooses_the_same(tmp_path):
    path = tmp_path / "deep" / "timings.json"
    first_calls, _, first = run(path)
    assert all(calls > 1 for calls in first_calls)
    written = path.read_bytes()
    calls, log, second = run(path)
    assert calls == [0, 0]
    assert log == []
    assert second == first
    assert path.read_bytes() == written
    assert os.listdir(path.parent) == ["timings.json"]


def test_another_device_version_or_shape_is_measured_anew(tmp_path, monkeypatch):
    path = tmp_path / "timings.json"
    run(path)
    assert all(run(path, device="other chip")[0])
    assert all(run(path, shapes=replace(SHAPES, tokens=9))[0])
    assert all(run(path, shapes=replace(SHAPES, dtype=torch.bfloat16))[0])
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert all(run(path)[0])
    monkeypatch.undo()
    assert run(path)[0] == [0, 0]  # nothing was lost meanwhile


def test_only_a_new_implementation_is_measured(tmp_path):
    path = tmp_path / "timings.json"
    run(path, names=("a",))
    calls, _, _ = run(path, names=("a", "b"))
    assert calls[0] == 0
    assert calls[1] > 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b'{"case": 3}',
        b'{"case": {"a": "fast"}}',
        b'{"case": {"a": NaN}}',
        b'{"case": {"a": -1}}',
        b'{"case": {"a": true}}',
    ],
)
def test_a_damaged_file_is_told_and_replaced(tmp_path, content):
    path = tmp_path / "timings.json"
    path.write_bytes(content)
    calls, log, _ = run(path)
    assert all(calls)
    assert len(log) == 1
    assert f"the timings in {path} cannot be used and are measured again" in log[0]
    assert run(path)[:2] == ([0, 0], [])


def test_where_nothing_can_be_written_the_choice_still_stands(tmp_path):
    (tmp_path / "file").write_text("in the way")
    _, log, record = run(tmp_path / "file" / "timings.json")
    assert record["chosen"] in {"a", "b", "reference"}
    assert any("were not kept" in line for line in log)


def test_known_timings_decide(tmp_path):
    path = tmp_path / "timings.json"
    run(path)
    document = json.loads(path.read_text())
    for by_name in document.values():
        by_name.update(a=3.0, b=1.0, reference=2.0)
    path.write_text(json.dumps(document))
    assert run(path)[2]["chosen"] == "b"


def test_the_file_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "portmoe" / "timings.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_file() == tmp_path / "home" / ".cache" / "portmoe" / "timings.json"


def test_without_a_home_directory_nothing_is_kept(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert cache_file() is None
    _, log, record = run(cache_file())
    assert record["chosen"] in {"a", "b", "reference"}
    assert "no home directory" in log[0]


def test_a_slow_call_is_not_repeated_for_long(monkeypatch):
    monkeypatch.setattr(measure, "BUDGET", 0.0)
    function = Counting()
    assert measure.seconds_per_call(operation(function), function, SHAPES, lambda: None) > 0
    assert function.calls == 1


def test_the_device_is_waited_for_before_and_after_every_call():
    order = []

    def function(x):
        order.append("call")
        return x + x

    timings = Timings("chip", synchronize=lambda: order.append("wait"))
    timings.seconds(operation(function), Implementation("swiglu", "a", function), SHAPES)
    assert order == ["wait", "call", "wait"] * (len(order) // 3)
    assert len(order) > 3
