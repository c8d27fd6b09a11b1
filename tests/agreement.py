"""Does a function agree with its operation's reference? Samples, calls and verdict, for every test.

The control is the reference in float64 on the CPU, with the same downstream gradients.
"""

import torch
from torch.utils._pytree import tree_leaves, tree_map

from portmoe.ops import Workload

CPU = torch.device("cpu")


def workload(dtype=torch.float32, device=CPU, **changes):
    """A small workload, no two of its sizes alike."""
    sizes = {
        "tokens": 24,
        "seq_len": 8,
        "hidden": 16,
        "heads": 2,
        "head_dim": 8,
        "ffn_width": 24,
        "vocab": 40,
        "experts": 4,
        "top_k": 2,
        "capacity": 12,
        "equal_segments": True,
    }
    sizes |= changes
    sizes.setdefault("dropless", sizes["capacity"] == 0)
    return Workload(device=device, dtype=dtype, **sizes)


def samples(operation, shapes):
    return operation.samples(shapes, torch.Generator().manual_seed(0))


def results(function, sample, *, control=False):
    """All that a call produces: outputs, tensors written to, and the gradient of every leaf."""

    def fresh(leaf):
        if isinstance(leaf, torch.Generator):
            return leaf.clone_state()
        if not isinstance(leaf, torch.Tensor):
            return leaf
        value = leaf.detach().clone()
        if control:
            value = value.cpu().double() if leaf.is_floating_point() else value.cpu()
        return value.requires_grad_(leaf.requires_grad)

    args, kwargs = tree_map(fresh, (sample.args, sample.kwargs))
    outputs = [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    sources = [t for t in outputs if t.requires_grad]
    wanted = [t for t in inputs if t.requires_grad]
    generator = torch.Generator().manual_seed(3)
    downstream = [torch.randn(t.shape, generator=generator).to(t.dtype).to(t.device) for t in sources]
    grads = torch.autograd.grad(sources, wanted, downstream, materialize_grads=True) if sources else ()
    return [*outputs, *(t for t in inputs if not t.requires_grad), *grads]


def assert_agrees(function, operation, shapes):
    """Every sample of the workload ``shapes``, within the operation's tolerance."""
    for sample in samples(operation, shapes):
        ours = results(function, sample)
        control = results(operation.reference, sample, control=True)
        assert len(ours) == len(control)
        for value, expected in zip(ours, control, strict=True):
            if value.is_floating_point():  # which class is highest may differ between precisions
                needed = operation.tolerance(sample).needed(value, expected)
                assert needed <= 1, f"{sample.label}: needs {needed:.2f} of the tolerance"
