"""When a run is worth nothing any more, and what is kept of it."""

import json
import math
import subprocess

import pytest
from run_portmoe import command, environment, records

from portmoe.config import Config
from portmoe.training.divergence import Divergence

GOOD, NAN, SKIPPED = (3.0, False), (math.nan, True), (3.0, True)


def watched(steps, dtype="bfloat16", scale=1.0, limit=5):
    tree = {"model": {"dtype": dtype}, "trainer": {"max_skipped_steps": limit}}
    divergence = Divergence(Config.model_validate(tree))
    for step, (loss, skipped) in enumerate(steps):
        if divergence.reached:
            return divergence, step
        divergence.note(step, loss, 100, skipped, scale)
    return divergence, len(steps)


@pytest.mark.parametrize(
    ("steps", "ended_after", "first"),
    [
        ([GOOD] * 8, 8, None),
        ([GOOD, *[NAN] * 9], 6, 1),
        ([GOOD, *[SKIPPED] * 9], 6, 1),
        ([*[NAN] * 4, GOOD, *[SKIPPED] * 4], 9, 5),  # ends within a row of four
        ([*[NAN] * 4, GOOD], 5, None),
        ([GOOD, (math.inf, False)], 2, 1),
    ],
)
def test_bad_steps_in_a_row(steps, ended_after, first):
    divergence, done = watched(steps)
    assert done == ended_after
    if first is None:
        assert divergence.verdict() is None
        assert divergence.sound
    else:
        assert f"from step {first} on" in divergence.verdict()
        assert not divergence.sound


def test_in_float16_skipped_steps_count_from_the_smallest_scale():
    assert watched([SKIPPED] * 9, "float16", 2.0)[0].verdict() is None
    assert watched([SKIPPED] * 9, "float16", 2.0)[0].sound
    lost, done = watched([GOOD, *[NAN] * 9], "float16", 2.0)  # no scale makes a loss that is no number
    assert (done, lost.sound) == (6, False)
    assert "from step 1 on 5 steps in a row made no progress: the loss is nan" in lost.verdict()
    assert watched([SKIPPED] * 9, "float16", 1.0)[1] == 5


def test_the_limit_can_be_another_or_none():
    assert watched([NAN] * 9, limit=1)[1] == 1
    divergence, done = watched([NAN] * 9, limit=None)
    assert (done, divergence.reached) == (9, False)
    assert "from step 0 on 9 steps in a row" in divergence.verdict()


def test_a_diverged_run_ends_with_4_and_keeps_its_good_checkpoint(tmp_path):
    """Skipped steps never come before a good one here, so the warm-up is what lets some be good."""
    keys = {"adam__lr": 1e30, "lr_scheduler__init_steps": 4, "ckpt__enable_save_ckpt": True}
    done = subprocess.run(
        command(tmp_path, 1, **keys, ckpt__checkpoint_every=1, ckpt__keep=1, data__total_steps=30),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 4, done.stdout + done.stderr
    steps = records(tmp_path)
    first = next(record["step"] for record in steps if record["loss"] is None)
    assert first >= 4
    assert len(steps) == first + 5
    assert f"diverged: from step {first} on 5 steps in a row" in done.stderr
    assert "Traceback" not in done.stderr
    kept = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    # The newest came from the last good step and holds its broken update; the one before it is sound.
    assert kept == [f"step-{first - 1:08d}", f"step-{first:08d}"]
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "diverged"}
    assert "finished" not in done.stdout
