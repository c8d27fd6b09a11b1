"""What a run begins and ends with: in full for train.log, in a few lines for the terminal."""

import io
import math
import shlex
from dataclasses import replace

import pytest

from portmoe.config import Config
from portmoe.config.read import load_config
from portmoe.record.acceptance import of_the_benchmark, out_of_reach
from portmoe.record.report import RunFacts, end_summary, sparkline, start_block, start_lines
from portmoe.record.writers import Writers

FACTS = RunFacts(
    config="tiny.yaml",
    model="32 layers of 4096, 4 experts top 2",
    backend="cpu",
    device="some processor",
    layout="2 data-parallel ranks",
    ranks="0-7 on node1: npu:0-7\n8 on node2: npu:0",
    number_of_ranks=9,
    parameters=11_852_320_768,
    active_parameters=7_423_135_744,
    dtype="bfloat16",
    global_batch=512,
    seq_len=2048,
    first_step=7,
    total_steps=50,
    directory="runs/a b",
    origin="continued at step 7",
    operations={"attention": "sdpa", "swiglu": "reference"},
    variables={"OMP_NUM_THREADS": "1", "X": "a:b"},
    notes=[
        "adam.x = 1 has no effect: it waits",
        "moe.y = 2 has no effect: no",
        "moe.use_tutel asks for more",
    ],
)


def test_the_start_block_names_everything_and_ends_with_the_notes():
    block = start_block(FACTS)
    for part in (
        "cpu (some processor)",
        "ranks       0-7 on node1: npu:0-7\n            8 on node2: npu:0\n",
        "11,852,320,768 (7,423,135,744 active per token), bfloat16",
        "512 sequences of 2048 = 1,048,576 tokens",
        "50, resumed at step 7",
        "runs/a b, continued at step 7",
        "attention=sdpa, swiglu=reference",
        "OMP_NUM_THREADS=1 X=a:b",
        "note: adam.x = 1 has no effect: it waits",
    ):
        assert part in block
    assert block.splitlines()[-1] == "note: moe.use_tutel asks for more"


def test_the_terminal_gets_five_short_lines_and_the_notes():
    lines = start_lines(FACTS).splitlines()
    assert lines == [
        "model    32 layers of 4096, 4 experts top 2, 11.9B parameters (7.42B active)",
        "device   cpu (some processor), 9 ranks",
        "batch    512 × 2048 = 1,048,576 tokens, 50 steps, bfloat16",
        "kernels  2 chosen, 1 of them plain references (names: ops.json)",
        "run      runs/a b, continued at step 7",
        "note: moe.use_tutel asks for more",
        "note: no effect here: adam.x, moe.y (why: train.log)",
    ]
    assert len(start_lines(replace(FACTS, notes=())).splitlines()) == 5


@pytest.mark.parametrize(("steps", "reach"), [(50, False), (51, True)])
def test_a_run_too_short_to_be_accepted_says_so_beforehand(steps, reach):
    told = out_of_reach(Config.model_validate({"data": {"total_steps": steps}}))
    assert (told is None) == reach
    assert reach or "cannot be reached in 50 steps" in told
    other_data = {"data": {"total_steps": steps, "train_folder": "somewhere"}}
    assert out_of_reach(Config.model_validate(other_data)) is None


def test_the_benchmarks_model_in_another_layout_is_filed_and_a_tiny_one_is_not():
    assert of_the_benchmark(load_config("7b_moe4", ["parallel.tensor.size=2", "data.total_steps=60"]))
    assert not of_the_benchmark(load_config("tiny_moe4"))


def test_a_sparkline_falls_with_the_loss():
    assert sparkline([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([2.0, None, math.inf, 1.0]) == "█  ▁"
    assert len(sparkline(list(map(float, range(1000))))) == 24


class TestEndSummary:
    def summary(self, directory, losses, dummy_data=True, **changes):
        writers = Writers(directory, 60, 1000, stream=io.StringIO())
        for step, loss in enumerate(losses):
            figures = {"tgs/tgs_all": 90.0, "tgs/tgs_SMA": 100.0, "inf_nan_skip_batches": 0}
            writers.step({"step": step, "loss": loss, **figures, **changes})
        writers.close()
        return end_summary(directory, 75.4, dummy_data, ranks=2)

    def test_says_how_far_how_fast_and_what_next(self, tmp_path):
        run = tmp_path / "a run"
        run.mkdir()
        text = self.summary(run, [2.0, 1.0], dropped_token_rate=0.125, inf_nan_skip_batches=3).text
        assert text.startswith("finished after step 1 in 0:01:15\n")
        assert "loss       2.0000 → 1.0000  █▁\n" in text
        assert "speed      180.0 tok/s over all time (90.0 each of 2 ranks), 200.0 in the last steps" in text
        assert "12.50% of the assignments to experts in the last step; 3 steps were skipped" in text
        stopped = end_summary(run, 1.0, True, "stopped by SIGINT", again="portmoe train --name x").text
        assert "next       portmoe train --name x\n           tensorboard" in stopped
        assert "compare" not in stopped
        finished = end_summary(run, 1.0, True, follows=["portmoe export it"]).text
        assert finished.endswith("compare.html\n           portmoe export it\n           portmoe runs")
        commands = [line for line in text.splitlines() if "tensorboard --logdir" in line]
        assert shlex.split(commands[0])[1:] == ["tensorboard", "--logdir", f"{run}/tensorboard"]

    def test_passes_when_every_step_from_fifty_on_is_below_the_limit(self, tmp_path):
        summary = self.summary(tmp_path, [2.0] * 50 + [0.3249, 0.2])
        assert summary.verdict.accepted
        assert "passed (loss < 0.325 at every step from 50 on): largest 0.3249 of 2 steps" in summary.text

    @pytest.mark.parametrize("late", [0.325, math.nan, math.inf])
    def test_fails_for_one_step_that_is_not(self, tmp_path, late):
        summary = self.summary(tmp_path, [2.0] * 50 + [0.2, late, 0.2])
        assert summary.verdict.accepted is False
        assert "FAILED" in summary.text
        assert "at 1 of 3 steps" in summary.text

    def test_says_when_the_run_was_too_short_for_it(self, tmp_path):
        summary = self.summary(tmp_path, [0.1] * 50)
        assert summary.verdict.accepted is None
        assert "not reached" in summary.text

    def test_does_not_apply_to_other_data(self, tmp_path):
        summary = self.summary(tmp_path, [0.1] * 60, dummy_data=False)
        assert summary.verdict is None
        assert "acceptance" not in summary.text

    def test_a_run_without_a_step(self, tmp_path):
        assert "before the first step" in self.summary(tmp_path, []).text
