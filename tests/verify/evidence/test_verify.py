"""Run directories checked against themselves: doctored ones are named, honest ones are not accused."""

import json
import shutil
import signal
import time
from contextlib import suppress

import pytest
from click.testing import CliRunner
from run_portmoe import arguments, environment
from tampered import REWRITTEN, STEP, TAMPERED, lines_of
from worlds import records, train
from zygote import start_portmoe

from portmoe.cli.verify import verify as command
from portmoe.errors import ConfigError
from portmoe.verify.evidence import report
from portmoe.verify.evidence.verify import verify

STEPS = 10
SAVED = (
    *("ckpt.enable_save_ckpt=true", "ckpt.keep_steps=[0,5,9]", f"data.total_steps={STEPS}"),
    "lr_scheduler.warmup_ratio=0.3",  # so that how long a run is meant to last shows from its first step on
)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    world(1).call(train, directory, *SAVED)
    return directory


@pytest.fixture
def doctored(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def honest(path):
    found = verify(path)
    assert found.passed, report.text(found)
    return found


def cut(run, lines, entries, torn_line=0, torn_entry=0):
    """As a run that was killed: so many lines and entries of the chain, and bytes of the next ones."""
    for name, kept, torn in (("metrics.jsonl", lines, torn_line), ("chain.jsonl", entries, torn_entry)):
        content = (run / name).read_bytes().splitlines(keepends=True)
        (run / name).write_bytes(b"".join(content[:kept]) + (content[kept][:torn] if torn else b""))
    (run / "status.json").write_text('{"state": "running"}\n')
    for step in (9, 10):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")


@pytest.mark.parametrize("name", TAMPERED)
def test_a_doctored_directory_is_named_by_file_and_line_tensor_or_key(doctored, name):
    doctor, place = TAMPERED[name]
    doctor(doctored)
    found = verify(doctored)
    assert not found.passed
    told = [f"{result.subject} {result.name} {result.detail}" for result in found.failed]
    assert any(part in line for line in told for part in place.split("|")), report.text(found)
    assert report.verdict(found).startswith(f"this is not what a run has written: {found.failed[0].subject}")
    assert len(report.verdict(found)) < 100  # a headline
    assert "is as written: " not in "".join(
        line for line in report.text(found).splitlines() if line.startswith("[FAIL]")
    )


@pytest.mark.parametrize(
    "name",
    [
        name if name == "lower losses everywhere" else pytest.param(name, marks=pytest.mark.slow)
        for name in REWRITTEN
    ],
)
def test_a_consistent_rewrite_is_found_by_replay_alone(doctored, name):
    doctor, place = REWRITTEN[name]
    doctor(doctored)
    honest(doctored)  # and the report says that this is as far as it sees
    assert "--replay cpu" in report.text(verify(doctored))
    done = CliRunner().invoke(command, [str(doctored), "--replay", "cpu"])
    assert done.exit_code == 4, done.output
    assert f"[FAIL] replay: {place}" in done.output


def test_a_finished_run_elsewhere(doctored):
    found = honest(doctored)
    assert {result.status for result in found.results} == {"pass"}
    assert "10 of 10 steps drawn again" in report.text(found)


# The chain begins with the start and the checkpoint of step 0; that of step 5 comes before its line.
KILLED = {
    "while a line was written": (8, 11, 100, 0),
    "between a line and its entry": (8, 10, 0, 0),
    "while its entry was written": (8, 10, 0, 50),
    "after both": (8, 11, 0, 0),
}


@pytest.mark.parametrize("where", KILLED)
def test_a_run_that_was_killed_while_writing(doctored, where):
    cut(doctored, *KILLED[where])
    honest(doctored)


def test_a_run_that_was_killed_and_goes_on_on_other_ranks_and_for_longer(world, doctored):
    cut(doctored, *KILLED["while its entry was written"])
    (doctored / "checkpoints/step-00000009.partial").mkdir()
    world(2).call(train, doctored, *SAVED, "data.total_steps=14", "parallel.pipeline.size=2")
    found = honest(doctored)
    assert [record["step"] for record in records(doctored)] == list(range(14))
    rates = [record["lr"] for record in records(doctored)]
    assert rates[-1] > 1e-5  # the schedule is another from the resumption on
    assert sum('"kind": "start"' in line for line in (doctored / "chain.jsonl").open()) == 2
    assert "14 of 14 steps drawn again" in report.text(found)
    done = CliRunner().invoke(command, [str(doctored), "--replay", "cpu"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.skip_batches='2,6-7'",),
        ("model.dtype=bfloat16", "moe.noisy_gate_policy=Jitter", "data.valid_every=4"),
        pytest.param(
            ("model.moe_type=MegaBlock-D", "data.fixed_random_dataset_seqlen=false"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("model.dtype=float16", "grad_scaler.fp16.initial_scale=16777216"), marks=pytest.mark.slow
        ),
        pytest.param(("adam.lr=100.0", "lr_scheduler.warmup_ratio=0.0"), marks=pytest.mark.slow),
    ],
    ids=lambda overrides: overrides[0],
)
def test_runs_of_other_kinds(world, tmp_path, overrides):
    run = tmp_path / "run"
    with suppress(AssertionError):  # one may diverge
        world(1).call(train, run, *SAVED, *overrides)
    assert len(records(run)) > 2
    honest(run)


@pytest.mark.slow
def test_runs_that_are_really_killed_at_any_moment(tmp_path):
    for number, wait in enumerate((0.02, 0.11, 0.23)):
        run = tmp_path / str(number)
        line = arguments(run, data__total_steps=400, ckpt__enable_save_ckpt=True, ckpt__checkpoint_every=7)
        process = start_portmoe(line, environment())
        while not (run / "metrics.jsonl").exists() or len(lines_of(run)) < 20:
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate(60)
        honest(run)
        line = arguments(run, data__total_steps=60, ckpt__enable_save_ckpt=True, ckpt__checkpoint_every=7)
        started = start_portmoe(line, environment())
        started.communicate(120)
        assert started.returncode == 0
        honest(run)


def test_the_command_writes_its_reports(doctored, tmp_path):
    TAMPERED["a byte of a tensor"][0](doctored)
    done = CliRunner().invoke(command, [str(doctored), "--out", str(tmp_path / "out")])
    assert done.exit_code == 4
    assert f"this is not what a run has written: {STEP}/__0_0.distcp" in done.output.splitlines()[-1]
    written = json.loads((tmp_path / "out/verify.json").read_text())
    assert not written["passed"]
    assert {"date", "host", "command", "portmoe", "commit"} <= written["provenance"].keys()
    assert "its checksum is wrong" in (tmp_path / "out/verify.html").read_text()
    with pytest.raises(ConfigError, match=r"neither config\.yaml nor metrics\.jsonl"):
        verify(tmp_path / "out")
