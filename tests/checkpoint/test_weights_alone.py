"""``ckpt.save_optimizer: false``: checkpoints a third as large, and what can be done with them."""

import pytest
from run_portmoe import arguments, environment, losses, records, run
from zygote import portmoe

SAVING = {"ckpt__enable_save_ckpt": True, "ckpt__checkpoint_every": 2, "lr_scheduler__total_steps": 6}
ALONE = SAVING | {"ckpt__save_optimizer": False}


def size(checkpoint):
    return sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))


def test_weights_alone(tmp_path):
    run(tmp_path / "run", data__total_steps=6, **SAVING)
    run(tmp_path / "alone", data__total_steps=4, **ALONE)
    whole = tmp_path / "run" / "checkpoints" / "step-00000004"
    weights = tmp_path / "alone" / "checkpoints" / "step-00000004"
    assert size(weights) == pytest.approx(size(whole) / 3, rel=0.1)

    # nothing goes on from them as if nothing were missing
    done = portmoe(arguments(tmp_path / "alone", data__total_steps=6, **ALONE), environment())
    assert done.returncode == 2
    assert "without Adam's moments (ckpt.save_optimizer=false)" in done.stderr
    assert f"{{path: {weights}, content: [model, sampler, scheduler]}}" in done.stderr
    assert len(records(tmp_path / "alone")) == 4

    # asked for, as that message says: the same weights and step, so the next loss is that of the whole run
    start = {"path": str(weights), "content": ["model", "sampler", "scheduler"]}
    run(tmp_path / "fresh", data__total_steps=6, ckpt__load_ckpt_info=start, **SAVING)
    fresh = losses(records(tmp_path / "fresh"))
    assert [record["step"] for record in records(tmp_path / "fresh")] == [4, 5]
    assert fresh[0] == losses(records(tmp_path / "run"))[4]
    assert fresh[1] != losses(records(tmp_path / "run"))[5]  # the moments begin anew
