"""A group of operations that one fused implementation may serve: what is chosen, recorded and called."""

import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from agreement import assert_agrees, workload

from portmoe.config.schema import Config
from portmoe.config.sections.execution import OpsConfig
from portmoe.errors import ConfigError
from portmoe.ops import OPERATIONS, Group, Implementation, choose
from portmoe.ops.operation import Sample, draw, rounding


def composed(functions):
    def add_norm(x_TH, residual_TH, weight_H, eps):
        sum_TH = x_TH + residual_TH
        return sum_TH, functions["rms_norm"](sum_TH, weight_H, eps)

    return add_norm


def samples(shapes, generator):
    x_TH, residual_TH = (draw((shapes.tokens, shapes.hidden), shapes, generator) for _ in range(2))
    return [Sample("normal", (x_TH, residual_TH, draw((shapes.hidden,), shapes, generator), 1e-5))]


REFERENCES = {name: operation.reference for name, operation in OPERATIONS.items()}
ADD_NORM = Group(
    "add_norm", composed(REFERENCES), samples, rounding(8, sums=4), parts=("rms_norm",), compose=composed
)
BOTH = {"rms_norm": OPERATIONS["rms_norm"], "add_norm": ADD_NORM}


class Counting:
    """Implementations of the norm and of the group that count their calls."""

    def __init__(self, supports=lambda w: None):
        self.calls = Counter()
        self.offered = [
            Implementation("rms_norm", "mine", self.counted("rms_norm", REFERENCES["rms_norm"])),
            Implementation("add_norm", "fused", self.counted("add_norm", ADD_NORM.reference), supports),
        ]

    def counted(self, name, function):
        def call(*args):
            self.calls[name] += 1
            return function(*args)

        return call


def model(ops):
    """A norm of its own, and one behind a residual."""
    x_TH, weight_H = torch.ones(3, 16), torch.ones(16)
    x_TH = ops.at("first").rms_norm(x_TH, weight_H, 1e-5)
    return ops.at("later").add_norm(x_TH, x_TH, weight_H, 1e-5)


SITES = {"rms_norm": {"first": workload()}, "add_norm": {"later": workload(tokens=3)}}


def test_a_fused_implementation_serves_the_group_alone():
    counting = Counting()
    table = choose(BOTH, counting.offered, SITES, Config())
    sum_TH, _ = model(table)
    assert sum_TH.allclose(torch.tensor(2.0))
    assert counting.calls == {"rms_norm": 1, "add_norm": 1}
    record = table.record()
    assert record.keys() == {"rms_norm@first", "add_norm@later"}  # the norm is not called at "later"
    assert record["add_norm@later"]["chosen"] == "fused"
    assert [c["name"] for c in record["add_norm@later"]["candidates"]] == ["fused", "parts"]


@pytest.mark.parametrize(
    ("settings", "supports", "reason"),
    [
        (Config(), lambda w: "rows too short" if w.tokens < 9 else None, "rows too short"),
        (Config(ops=OpsConfig(disable=["add_norm.fused"])), lambda w: None, "switched off by ops.disable"),
    ],
)
def test_otherwise_its_parts_compute_it_and_are_recorded_there(settings, supports, reason):
    counting = Counting(supports)
    table = choose(BOTH, counting.offered, SITES, settings)
    model(table)
    assert counting.calls == {"rms_norm": 2}
    record = table.record()
    assert record["add_norm@later"]["chosen"] == "parts"
    assert record["add_norm@later"]["candidates"][0]["reason"] == reason
    assert record["rms_norm@later"]["chosen"] == "mine"
    assert record["rms_norm@first"]["chosen"] == "mine"


def test_the_composition_agrees_with_the_groups_contract_and_is_always_there():
    assert_agrees(composed(REFERENCES), ADD_NORM, workload())
    table = choose(BOTH, [], workload(), Config())
    assert table.record()["add_norm"]["chosen"] == "parts"
    with pytest.raises(ConfigError, match=r"take add_norm\.parts out of ops\.disable"):
        choose(BOTH, [], workload(), Config(ops=OpsConfig(disable=["add_norm.parts"])))


def test_the_faster_way_is_taken_where_it_is_measured():
    def slowly(functions):
        def add_norm(*args):
            time.sleep(0.005)
            return composed(functions)(*args)

        return add_norm

    settings = Config(ops=OpsConfig(select="measure"))
    for compose, chosen in ((slowly, "fused"), (composed, "parts")):
        offered = Counting().offered[:1]
        fused = ADD_NORM.reference if chosen == "fused" else slowly(REFERENCES)
        operations = BOTH | {"add_norm": replace(ADD_NORM, compose=compose)}
        offered.append(Implementation("add_norm", "fused", fused))
        assert choose(operations, offered, SITES, settings).record()["add_norm@later"]["chosen"] == chosen
