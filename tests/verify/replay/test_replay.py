"""Replays of recorded runs: right ones agree on any backend, layout and dtype; wrong runs are told apart."""

import json
import shutil
from contextlib import nullcontext

import pytest
from click.testing import CliRunner
from faults_of_runs import FAULTS, RESUMED_AT
from worlds import records, train

from portmoe.cli.replay import replay as command
from portmoe.errors import ConfigError
from portmoe.verify.replay import report
from portmoe.verify.replay.recompute import recompute
from portmoe.verify.replay.recorded import config_of_replay, read_recorded
from portmoe.verify.replay.replay import RECORD, replay_of

STEPS = 10
KEPT = ("ckpt.keep_steps=[0,5,9]", f"data.total_steps={STEPS}")
# None of the CPU's own implementations: another computer, as far as rounding goes.
PLAIN = (
    *("attention.compiled", "attention.sdpa", "rms_norm.torch", "swiglu.silu", "cross_entropy.chunked"),
    "router.lean",
    *("dispatch.gather", "combine.gather", "expert_ffn.loop", "adamw.fused", "adamw.foreach"),
)


def trained(directory, fault, *overrides):
    """A rank's part of a run, with a fault or with none."""
    with FAULTS[fault].planted() if fault else nullcontext():
        train(directory, *overrides)


def remade(run, out, ranks, dtype=None, overrides=()):
    """A rank's part of a replay."""
    recorded = read_recorded(run)
    config = config_of_replay(recorded, out / RECORD, "cpu", ranks, dtype, overrides)
    recompute(config, recorded, "cpu", "torchrun", lambda line: None)


@pytest.fixture(scope="module")
def recorded(world, tmp_path_factory):
    """A run of one rank in float32."""
    directory = tmp_path_factory.mktemp("recorded") / "run"
    world(1).call(trained, directory, None, *KEPT)
    return directory


@pytest.fixture
def replayed(world, tmp_path):
    """``replayed(run, ranks=1, dtype=None, overrides=())``: what a replay of the run comes to."""

    def one(run, ranks=1, dtype=None, overrides=()):
        world(ranks).call(remade, run, tmp_path / "out", ranks, dtype, overrides)
        return replay_of(read_recorded(run), tmp_path / "out")

    return one


def needed(found):
    """The largest deviation of each quantity."""
    worst = {}
    for result in found.results:
        if result.needed is not None:
            worst[result.name] = max(result.needed, worst.get(result.name, 0.0))
    return worst


def test_the_steps_of_keep_steps_are_saved_and_kept_and_record_what_a_replay_needs(recorded):
    kept = sorted(folder.name for folder in (recorded / "checkpoints").glob("step-*"))
    assert kept == ["step-00000000", "step-00000005", "step-00000009"]
    measured = [r["step"] for r in records(recorded) if any(key.startswith("weight_change/") for key in r)]
    assert measured == [0, 5, 9]


@pytest.mark.parametrize(
    ("ranks", "dtype", "overrides"),
    [
        (1, None, [f"ops.disable=[{','.join(PLAIN)}]"]),
        (2, None, ["parallel.tensor.size=2"]),
        (2, None, ["parallel.pipeline.size=2"]),
        pytest.param(4, None, [], marks=pytest.mark.slow),
        pytest.param(4, None, ["parallel.zero1.fsdp=true"], marks=pytest.mark.slow),
        pytest.param(
            4,
            None,
            ["parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2"],
            marks=pytest.mark.slow,
        ),
        (1, "bfloat16", []),
    ],
)
def test_right_steps_agree_from_a_directory_that_was_moved(
    recorded, replayed, tmp_path, ranks, dtype, overrides
):
    moved = shutil.copytree(recorded, tmp_path / "elsewhere" / "run")
    found = replayed(moved, ranks, dtype, overrides)
    assert found.passed, report.text(found)
    assert {result.subject for result in found.results} == {"step 0", "step 5", "step 9"}
    assert not [result for result in found.results if result.status == "skip"]
    worst = needed(found)
    if dtype is None:  # far inside the bands
        assert worst["gradient norms of parameters"] < 1.5e-6
        assert worst["change of the weights"] < 5e-6
    else:
        assert worst["loss"] > 1e-6  # it was computed in another dtype indeed


def test_a_run_of_two_ranks_in_bfloat16_is_replayed_by_one_in_float32(world, replayed, tmp_path):
    run = tmp_path / "run"
    world(2).call(trained, run, None, *KEPT, "model.dtype=bfloat16", "parallel.expert.size=2")
    found = replayed(run, 1, "float32")
    assert found.passed, report.text(found)
    assert len(found.recorded.starts) == 3


# One for each part of a step in which a run can go wrong; the others rarely break alone.
QUICK = (
    *("the schedule starts anew", "the moments are lost", "a rank trains on another's data"),
    *("the weights are stale after a save", "the auxiliary loss counts once a rank", "nothing is clipped"),
)


@pytest.mark.parametrize(
    "fault", [fault if fault in QUICK else pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS]
)
def test_a_run_gone_wrong_is_told_by_what_differs_first(world, replayed, tmp_path, fault):
    run, planted = tmp_path / "run", FAULTS[fault]
    schedule = (*KEPT, f"lr_scheduler.total_steps={STEPS}")
    if planted.resumed:
        world(1).call(trained, run, None, *schedule, f"data.total_steps={RESUMED_AT}")
    world(planted.ranks).call(trained, run, fault, *schedule)
    found = replayed(run)
    assert not found.passed
    assert found.first.name == planted.first, report.text(found)
    failed = {result.subject for result in found.results if result.status == "fail"}
    if planted.resumed:
        assert "step 0" not in failed
        assert "step 5" in failed
    assert found.first.subject in report.verdict(found)
    assert planted.first in report.verdict(found)


def test_the_command_writes_its_reports_and_ends_with_4_where_a_step_differs(recorded, tmp_path, monkeypatch):
    """The steps are made already: what the command does before and after."""
    run = shutil.copytree(recorded, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    edited = json.loads(lines[5])
    edited["loss"] *= 1.001
    (run / "metrics.jsonl").write_text("\n".join([*lines[:5], json.dumps(edited), *lines[6:]]) + "\n")
    out = tmp_path / "out"
    done = CliRunner().invoke(command, [str(run), "--backend", "cpu", "--out", str(out), "--steps", "5-9"])
    assert done.exit_code == 4, done.output
    assert "[FAIL] step 5" in done.output
    assert "[PASS] step 9" in done.output
    assert "step 5 differs from the record, first in: loss" in done.output.splitlines()[-2]
    assert f"next: portmoe bisect --backend cpu --config {run}/config.yaml" in done.output.splitlines()[-1]
    stored = json.loads((out / "replay.json").read_text())
    assert stored["steps"] == [5, 9]
    assert {"date", "host", "command", "portmoe", "commit"} <= stored["provenance"].keys()
    page = (out / "replay.html").read_text()
    assert "differs from the record" in page
    assert "http" not in page.partition("</style>")[2].replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("wanted", "overrides", "told"),
    [
        ("7", [], "--steps 7: there is no checkpoint of step 7; checkpoints that can be replayed: 0, 5, 9"),
        ("x", [], "--steps x: 'x' is neither a step nor a range"),
        (None, ["adam.lr=1e-4"], "a replay computes the same mathematics"),
        (None, ["moe.top_k=1"], "the run has moe.top_k="),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_name(recorded, tmp_path, wanted, overrides, told):
    with pytest.raises(ConfigError, match=told):
        config_of_replay(read_recorded(recorded, (), wanted), tmp_path, "cpu", 1, None, overrides)


def test_checkpoints_of_weights_alone_are_refused(recorded):
    with pytest.raises(ConfigError, match=r"hold weights alone \(ckpt\.save_optimizer=false\)"):
        read_recorded(recorded, ["ckpt.save_optimizer=false"])


def test_a_run_without_checkpoints_says_how_to_leave_them(recorded, tmp_path):
    run = shutil.copytree(recorded, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    with pytest.raises(ConfigError, match=r"has no checkpoint .* train with ckpt\.keep_steps"):
        read_recorded(run)


def test_no_number_is_no_agreement(recorded, replayed, tmp_path):
    run = shutil.copytree(recorded, tmp_path / "run")
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in kept:
        for key in [key for key in record if key.startswith("weight_change/")]:
            del record[key]
        record["loss"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    found = replayed(run)
    assert found.first.name == "loss"
    skipped = {result.name for result in found.results if result.status == "skip"}
    assert skipped == {"change of the weights"}
