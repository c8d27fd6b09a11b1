"""What holds for every operation: its samples run, and every implementation agrees with its reference.

The control of each comparison is the reference in float64; the tolerances are the operation's own.
"""

import math

import pytest
import torch
from agreement import assert_agrees, results, samples, workload
from torch.utils._pytree import tree_leaves, tree_map

from portmoe.backends.cpu.ops import CpuOperations
from portmoe.backends.torch import ops as torch_ops
from portmoe.ops import OPERATIONS
from portmoe.ops.measure import seconds_per_call
from portmoe.ops.operation import Tolerance, rounding

TORCHS = [pytest.param(i, id=f"{i.op}.{i.name}") for i in torch_ops.ALL]
FOR_CPUS = [
    pytest.param(i, id=f"{i.op}.{i.name}")
    for i in CpuOperations().implementations()
    if i not in torch_ops.ALL
]


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_reference_needs_no_more_than_its_own_tolerance(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_agrees(OPERATIONS[name].reference, OPERATIONS[name], workload(dtype))


@pytest.mark.parametrize("implementation", TORCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_implementation_of_torch_agrees_with_the_reference(implementation, dtype):
    shapes = [workload(dtype, **more) for more in ({}, {"log_sum": True})]
    operation = OPERATIONS[implementation.op]
    supported = [one for one in shapes if operation.why_not(implementation, one) is None]
    assert supported
    for one in supported:
        assert_agrees(implementation.function, operation, one)


@pytest.mark.parametrize("implementation", FOR_CPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_implementation_for_cpus_agrees_with_the_reference(implementation, dtype):
    if implementation.name == "compiled" and (reason := implementation.supports(workload(dtype))):
        pytest.skip(reason)
    assert_agrees(implementation.function, OPERATIONS[implementation.op], workload(dtype))


@pytest.mark.parametrize("implementation", [p for p in TORCHS + FOR_CPUS if not p.id.startswith("adamw")])
def test_rows_may_lie_apart_in_memory(implementation):
    def spread(leaf):
        if not isinstance(leaf, torch.Tensor) or leaf.dim() < 2 or not leaf.requires_grad:
            return leaf
        wide = torch.full((*leaf.shape[:-1], 2 * leaf.shape[-1]), math.nan)
        wide[..., : leaf.shape[-1]] = leaf.detach()
        return wide[..., : leaf.shape[-1]].requires_grad_()

    def outputs_and_gradients(args, kwargs):
        outputs = [t for t in tree_leaves(implementation.function(*args, **kwargs)) if t.requires_grad]
        leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
        return [*outputs, *torch.autograd.grad([t.square().sum() for t in outputs], leaves)]

    for sample in samples(OPERATIONS[implementation.op], workload()):
        if not any(isinstance(t, torch.Tensor) and t.requires_grad for t in sample.args):
            continue
        apart = outputs_and_gradients(tree_map(spread, sample.args), sample.kwargs)
        dense = outputs_and_gradients(sample.args, sample.kwargs)
        assert len(apart) > 1
        for ours, theirs in zip(apart, dense, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    "changes",
    [{"experts": 1}, {"tokens": 1, "seq_len": 1}, {"tokens": 7, "seq_len": 3, "equal_segments": False}],
    ids=str,
)
def test_samples_exist_for_small_and_odd_workloads(name, changes):
    for sample in samples(OPERATIONS[name], workload(**changes)):
        results(OPERATIONS[name].reference, sample)


@pytest.mark.parametrize("name", OPERATIONS)
def test_samples_depend_on_the_seed_only(name):
    first, second = (samples(OPERATIONS[name], workload()) for _ in range(2))
    labels = [sample.label for sample in first]
    assert len(set(labels)) == len(labels)
    for a, b in zip(first, second, strict=True):
        for x, y in zip(tree_leaves((a.args, a.kwargs)), tree_leaves((b.args, b.kwargs)), strict=True):
            if isinstance(x, torch.Generator):
                x, y = x.get_state(), y.get_state()
            same = torch.equal(x.nan_to_num(), y.nan_to_num()) if isinstance(x, torch.Tensor) else x == y
            assert same


def test_names_are_the_contracts():
    assert all(name == operation.name for name, operation in OPERATIONS.items())
    assert {i.op for i in torch_ops.ALL} <= OPERATIONS.keys()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_reference_can_be_timed(name):
    assert seconds_per_call(OPERATIONS[name], OPERATIONS[name].reference, workload(), lambda: None) > 0


def test_a_call_is_judged_by_its_least_precise_argument():
    in_bfloat16 = {name: samples(op, workload(torch.bfloat16))[0] for name, op in OPERATIONS.items()}
    always_float32 = {"topk_gating", "megablock_gating", "softmax_gating", "adamw"}
    for name, operation in OPERATIONS.items():
        dtype = torch.float32 if name in always_float32 else torch.bfloat16
        assert operation.tolerance(in_bfloat16[name]) == operation.tolerances[dtype]


def test_the_old_place_of_torchs_own_paths_names_the_new_one():
    with pytest.raises(ImportError, match=r"from portmoe\.backends\.torch import ops as torch_ops"):
        from portmoe.ops import torch_native  # noqa: F401


def test_tolerance():
    tolerance = Tolerance(rtol=0.1, atol=0.0)
    assert tolerance.needed(torch.tensor([1.05]), torch.tensor([1.0])) == pytest.approx(0.5)
    assert tolerance.needed(torch.tensor([1.0]), torch.tensor([1.0])) == 0
    assert tolerance.needed(torch.tensor([0.1]), torch.tensor([0.0])) == math.inf
    assert tolerance.needed(torch.tensor([math.nan]), torch.tensor([1.0])) == math.inf
    assert tolerance.needed(torch.zeros(2), torch.zeros(3)) == math.inf
    assert tolerance.needed(torch.zeros(0), torch.zeros(0)) == 0
    # atol counts in the root mean square of what is not zero: 0.1 · sqrt(9)
    scaled = Tolerance(rtol=0.0, atol=0.1)
    assert scaled.needed(torch.tensor([3.0, 0.1]), torch.tensor([3.0, 0.0])) == pytest.approx(1 / 3)
    assert rounding(4)[torch.bfloat16].rtol == 4 * 2.0**-7
