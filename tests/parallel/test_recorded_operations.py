"""What ``ops.json`` says is what runs, in every layout: calls counted on real ranks."""

import json

import pytest
from worlds import MODEL, train

from portmoe.backends.cpu import cross_entropy as compiled_cross_entropy

TP2 = "parallel.tensor.size=2"


def loss_kernels(directory, *overrides) -> tuple[str, int]:
    """The loss recorded, and how often its kernel took logits in; runs on a rank."""
    kernels, calls = compiled_cross_entropy.Kernels, 0
    original = kernels.add

    def add(*args) -> None:
        nonlocal calls
        calls += 1
        original(*args)

    kernels.add = add
    try:
        train(directory, *overrides)
    finally:
        kernels.add = original
    return json.loads((directory / "ops.json").read_text())["cross_entropy"]["chosen"], calls


@pytest.mark.parametrize(
    "layout", [[], [TP2], [TP2, "parallel.tensor.mode=msp"], [TP2, "parallel.tensor.mode=isp"]]
)
def test_the_loss_that_is_recorded_computes(world, tmp_path, layout):
    steps, micro_batches = 2, 8  # of one sequence each
    assert {"data.global_batch_size=8", "data.micro_bsz=1"} <= {*MODEL}
    keys = (f"data.total_steps={steps}", *layout)
    for recorded, calls in world(2 if layout else 1).call(loss_kernels, tmp_path / "run", *keys):
        assert recorded == "compiled"
        assert calls == steps * micro_batches
