"""The acceptance report: each rule broken in turn on a copy of a real run, named and nothing else."""

import json
import shutil

import pytest

from portmoe.cli.main import run as portmoe
from portmoe.config.read import load_config
from portmoe.verify.acceptance import report
from portmoe.verify.acceptance.findings import examine

STEPS = 53


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A run of the small model on dummy data, its late losses set low enough to be accepted."""
    directory = tmp_path_factory.mktemp("acceptance") / "run"
    run(1, f"data.total_steps={STEPS}", directory=directory)
    edited(directory, lambda steps: [step | ({"loss": 0.1} if step["step"] >= 50 else {}) for step in steps])
    return directory


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def edited(directory, change):
    file = directory / "metrics.jsonl"
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(step) + "\n" for step in change(steps)))


def as_json(name, change):
    def edit(directory):
        file = directory / name
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return edit


def step_changed(number, **values):
    return lambda d: edited(d, lambda steps: [s | (values if s["step"] == number else {}) for s in steps])


def broken(directory, *overrides):
    """The names of the rules a run breaks, held against its own config with ``overrides``."""
    found = examine(directory, load_config(directory / "config.yaml", overrides), "its own")
    return {result.name for result in found.failed}


def test_an_honest_run_meets_its_own_rules_and_the_figures_are_those_of_the_steps(trained):
    found = examine(trained, load_config(trained / "config.yaml"), "its own")
    assert found.passed, report.text(found)
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    tokens, seconds = 8 * 32 * (STEPS - 5), sum(step["step_time"] for step in steps[5:])
    assert (found.window.first, found.window.last) == (5, STEPS - 1)
    assert found.window.tgs == pytest.approx(tokens / seconds, rel=1e-6)
    assert found.window.peak_memory == max(step["peak_memory"] for step in steps)
    assert found.window.tflops == pytest.approx(
        steps[9]["tflops"] / steps[9]["tgs/last_tgs_1"] * found.window.tgs
    )


FINDINGS = {
    "loss < 0.325": (step_changed(51, loss=0.33), "loss < 0.325 at every step from 50 on"),
    "a loss lost": (step_changed(52, loss=None), "loss < 0.325 at every step from 50 on"),
    "too short": (
        lambda d: edited(d, lambda steps: steps[:40]),
        "loss < 0.325 at every step from 50 on",
    ),
    "a gap": (lambda d: edited(d, lambda steps: [s for s in steps if s["step"] != 7]), "recorded"),
    "a faster rate": (step_changed(9, **{"tgs (tokens/gpu/second)": 1e9}), "times"),
    "no device": (as_json("environment.json", lambda e: e | {"device": ""}), "device"),
    "other data": (
        as_json("environment.json", lambda e: e | {"data": {"train": e["data"]["train"] | {"sha256": "0"}}}),
        "checksum",
    ),
    "no operations": (lambda d: (d / "ops.json").unlink(), "ops.json"),
    "no log": (lambda d: (d / "train.log").unlink(), "train.log"),
    "not finished": (as_json("status.json", lambda s: {"state": "running"}), "end"),
    "no memory": (
        lambda d: edited(
            d, lambda steps: [{k: v for k, v in s.items() if k != "peak_memory"} for s in steps]
        ),
        "speed",
    ),
}


@pytest.mark.parametrize("what", FINDINGS)
def test_what_is_missing_or_contradicts_is_a_finding(copy, what):
    edit, name = FINDINGS[what]
    edit(copy)
    assert name in broken(copy)
    assert len(broken(copy)) <= 2


@pytest.mark.parametrize(
    "override",
    [
        "adam.lr=2e-4",
        "lr_scheduler.total_steps=200",
        "loss.moe_loss_coeff=0.2",
        "hybrid_zero_optimizer.clip_grad_norm=0.5",
        "run.seed=7",
        "moe.capacity_factor=2.0",
        "data.seq_len=64",
    ],
)
def test_a_key_that_may_not_differ_is_named(trained, override):
    assert override.partition("=")[0] in broken(trained, override)


def test_keys_that_may_differ_are_said_to_and_break_nothing(trained):
    free = ("parallel.zero1.size=1", "data.micro_bsz=2", "moe.use_tutel=true", "model.checkpoint=true")
    free += ("data.total_steps=60", "ckpt.keep=9", "ops.select=measure", "trainer.max_skipped_steps=9")
    found = examine(trained, load_config(trained / "config.yaml", free), "its own")
    assert found.passed, report.text(found)
    said = {result.name: result.detail for result in found.results if result.part == "config"}
    assert {key.partition("=")[0] for key in free} <= said.keys()
    assert "may be traded" in said["data.micro_bsz"]


def test_a_larger_batch_than_allowed_is_broken(trained):
    assert broken(trained, "data.max_global_batch_size=8", "data.global_batch_size=8") == set()
    assert "global batch" in broken(trained, "data.global_batch_size=4", "data.max_global_batch_size=4")


def test_the_command_writes_a_page_of_its_own_and_says_what_is_next(copy, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        portmoe(["report", str(copy), "--against", "7b_moe4", "--out", str(tmp_path / "out")])
    assert ended.value.code == 4
    page = (tmp_path / "out" / "acceptance.html").read_text()
    assert len(page) < 200_000
    assert not any(forbidden in page for forbidden in ("<script", "http://", "https://", "src="))
    filed = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    failed = {rule["name"] for rule in filed["rules"] if rule["status"] == "fail"}
    assert {"model.hidden_size", "parameters"} <= failed
    assert len(filed["losses"]) == STEPS
    assert "next: portmoe verify" in capsys.readouterr().out
