"""A killed run resumes with bit-identical losses."""

import json
import os
import random
import signal
import subprocess
import time

import pytest
from run_portmoe import arguments, command, environment, losses, records, run
from zygote import start_portmoe

SAVING = {"ckpt__enable_save_ckpt": True, "ckpt__checkpoint_every": 2, "data__total_steps": 40}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run", **SAVING)


def start(directory, nproc=1, **more):
    more = SAVING | more
    if nproc == 1:
        return start_portmoe(arguments(directory, **more), environment())
    return subprocess.Popen(
        command(directory, nproc, **more),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_when(process, ready):
    """SIGKILL the run as soon as ``ready()``; False if it had ended before."""
    while process.poll() is None and not ready():
        time.sleep(0.002)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return alive


def steps_done(directory):
    return len(records(directory))


def saving(directory):
    """A checkpoint is being written right now, and another is complete."""
    names = [entry.name for entry in (directory / "checkpoints").glob("step-*")]
    return any(name.endswith(".partial") for name in names) and len(names) > 1


def kill_and_resume(directory, whole, ready):
    while not kill_when(start(directory), ready):
        pytest.fail("the run ended before it could be killed")
    run(directory, **SAVING)
    assert [record["step"] for record in records(directory)] == list(range(len(whole)))
    assert losses(records(directory)) == losses(whole)


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_killed_at_a_random_step(tmp_path, whole, seed):
    directory = tmp_path / "run"
    at = random.Random(seed).randrange(3, 35)
    kill_and_resume(directory, whole, lambda: steps_done(directory) >= at)


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 7))])
def test_killed_during_a_save(tmp_path, whole, number):
    directory = tmp_path / "run"
    kill_and_resume(directory, whole, lambda: steps_done(directory) > 4 + 4 * number and saving(directory))


@pytest.mark.parametrize(
    ("number", "nproc"),
    [(signal.SIGHUP, 1), (signal.SIGTERM, 2), pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, whole, number, nproc):
    directory = tmp_path / "run"
    process = start(directory, nproc=nproc)
    while steps_done(directory) < 5:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, output
    assert f"stopped by {number.name} (saved" in output
    assert json.loads((directory / "status.json").read_text()) == {"state": "stopped"}
    if nproc > 1:  # another global batch, so other losses
        return
    done = steps_done(directory)
    assert done < len(whole)
    resumed = run(directory, **SAVING)
    assert f"resumed at step {done}" in (directory / "train.log").read_text()
    assert losses(resumed) == losses(whole)


def test_two_ranks_killed_resume_too(tmp_path):
    shorter = SAVING | {"data__total_steps": 16}
    whole = run(tmp_path / "whole", 2, **shorter)
    directory = tmp_path / "run"
    assert kill_when(start(directory, 2, **shorter), lambda: steps_done(directory) >= 7)
    time.sleep(0.5)  # the ranks follow their parent
    assert losses(run(directory, 2, **shorter)) == losses(whole)
