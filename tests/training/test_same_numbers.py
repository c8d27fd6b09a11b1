"""The same global batch gives the same losses on 1, 2 and 4 ranks, in every case of ZeRO-1."""

import socket

import pytest
from run_portmoe import losses, run

LAYOUTS = [
    (2, -1),
    (4, 2),
    *(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((2, 1), (4, -1), (4, 1))),
]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single") / "run")


@pytest.mark.parametrize(("ranks", "zero1"), LAYOUTS)
def test_losses_and_norms_are_those_of_one_rank(tmp_path, single, ranks, zero1):
    metrics = run(tmp_path / "run", ranks, parallel__zero1__size=zero1)
    assert (
        f"0-{ranks - 1} on {socket.gethostname()}: cpu each" in (tmp_path / "run" / "train.log").read_text()
    )
    assert losses(metrics) == pytest.approx(losses(single), rel=1e-6)
    for one, many in zip(single, metrics, strict=True):
        assert one.keys() == many.keys()
        by_expert_and_group = [key for key in one if key.startswith(("grad_norm", "expert_load/"))]
        assert len(by_expert_and_group) > 3 * 4
        for key in ("moe_loss", "acc", "perplexity", *by_expert_and_group):
            assert many[key] == pytest.approx(one[key], rel=1e-5), key
        for key in ("tokens/en", "num_consumed_tokens", "lr", "adam_beta2"):
            assert many[key] == one[key], key
        assert many["dropped_token_rate"] == pytest.approx(one["dropped_token_rate"])


def test_noise_does_not_depend_on_the_layout(tmp_path):
    noisy = {"moe__use_fused_gating": False, "moe__noisy_gate_policy": "Jitter", "data__total_steps": 6}
    assert losses(run(tmp_path / "two", 2, **noisy)) == pytest.approx(
        losses(run(tmp_path / "one", 1, **noisy)), rel=1e-6
    )
