"""Planted faults: conformance must catch wrong implementations, and report no healthy one."""

from collections import defaultdict
from functools import cache

import faults_of_experts  # noqa: F401
import faults_of_layers  # noqa: F401
import faults_of_routing  # noqa: F401
import faults_of_softmax  # noqa: F401
import pytest
import torch
from planting import FAULTS

from portmoe.accelerator import get_accelerator
from portmoe.ops import OPERATIONS
from portmoe.ops.operation import Implementation
from portmoe.verify.backend.cases import SHAPES
from portmoe.verify.backend.conformance import check_operation

CPU = torch.device("cpu")


def implementation(f):
    return Implementation(f.op, f.name, f.function, handles=tuple(OPERATIONS[f.op].needs(SHAPES[f.shapes])))


@cache
def found(op, dtype, shapes):
    """Fault → what conformance says of it, for all of an operation's faults that show with these."""
    planted = [f for f in FAULTS if (f.op, f.dtype, f.shapes) == (op, dtype, shapes)]
    offered = [implementation(f) for f in planted]
    failed = defaultdict(list)
    for check in check_operation(OPERATIONS[op], offered, CPU, 0, [dtype], [shapes]):
        if check.status == "fail":
            failed[check.subject.removeprefix(f"{op}.")].append(f"{check.name}: {check.detail}")
    return failed


def test_there_are_enough_and_each_has_a_name_of_its_own():
    assert len(FAULTS) >= 40
    assert len({(f.op, f.name) for f in FAULTS}) == len(FAULTS)
    assert {f.op for f in FAULTS} == OPERATIONS.keys()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.op}: {f.name}")
def test_a_wrong_implementation_is_caught(fault):
    assert found(fault.op, fault.dtype, fault.shapes)[fault.name]


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_reference_beside_them_is_not_reported(op):
    assert not found(op, torch.float32, "odd")["reference"]


def unhealthy(op, seed, **some):
    offered = [i for i in get_accelerator("cpu").ops.implementations() if i.op == op]
    checks = list(check_operation(OPERATIONS[op], offered, CPU, seed, **some))
    assert any(check.status == "pass" for check in checks)
    return [check for check in checks if check.status == "fail"]


@pytest.mark.parametrize("op", OPERATIONS)
def test_no_healthy_implementation_is_reported(op):
    assert not unhealthy(op, seed=0, shapes=["odd"])


@pytest.mark.parametrize("op", ["topk_gating", "megablock_gating"])
def test_upstream_gradients_that_are_the_same_for_both_choices_do_not_cancel(op):
    """Weights add up to 1: equal gradients of both leave only rounding. Seed 34 once drew equal ones."""
    assert not unhealthy(op, seed=34, dtypes=[torch.float32], shapes=["larger"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("op", OPERATIONS)
def test_no_healthy_implementation_is_reported_in_twenty_runs(op, seed):
    assert not unhealthy(op, seed)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_wrong_implementation_is_caught_with_all_shapes_and_dtypes(op):
    planted = [f for f in FAULTS if f.op == op]
    offered = [implementation(f) for f in planted]
    checks = check_operation(OPERATIONS[op], offered, CPU, seed=1)
    failed = {check.subject for check in checks if check.status == "fail"}
    assert failed == {f"{op}.{f.name}" for f in planted}
