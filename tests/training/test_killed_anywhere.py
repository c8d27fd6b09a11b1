"""A fine-tuning killed twenty times, from its first token to its last file, is that of a run left alone."""

import os
import random
import signal
import time
from contextlib import suppress

import pytest
from run_portmoe import environment, records
from zygote import start_portmoe

SETTINGS = [
    *("data.num_epochs=1", "data.seq_len=512", "data.micro_bsz=1", "ckpt.checkpoint_every=7", "ckpt.keep=3"),
    *("eval.prompts=[]", "data.valid_every=40"),
]
SAME = ("data_crc32", "tokens/single", "tokens/dialogues", "loss", "grad_norm/default", "valid_loss")
KILLS = {"tokenizing": 5, "laying out": 5, "training": 6, "exporting": 4}


def start(folder):
    settings = [*SETTINGS, f"run.directory={folder / 'run'}", f"data.cache_folder={folder / 'cache'}"]
    keys = [part for setting in settings for part in ("--set", setting)]
    line = ["train", "--backend", "cpu", "--config", "tiny_mixtral_chat_full_facts_e3", *keys]
    return start_portmoe(line, environment())


def reached(folder, phase, steps):
    run, cache = folder / "run", folder / "cache"
    if phase == "tokenizing":
        return cache.exists()
    if phase == "laying out":
        return len(list(cache.glob("*/whole.json"))) == 2
    if phase == "training":
        return len(records(run)) >= steps
    return (run / "hf_model.partial").exists()


def killed(folder, phase, steps, delay):
    """Kill a run ``delay`` seconds into the phase, if it has not ended before."""
    process = start(folder)
    while process.poll() is None and not reached(folder, phase, steps):
        time.sleep(0.0002)
    time.sleep(delay)
    if process.poll() is None:
        with suppress(ProcessLookupError):  # it ends just now
            os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode != 0


def finished(folder):
    process = start(folder)
    said = process.communicate(280)[0]
    assert process.returncode == 0, said
    return {path.name: path.read_bytes() for path in (folder / "run" / "hf_model").iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_twenty_times_from_the_first_token_to_the_last_file(tmp_path):
    whole = finished(tmp_path / "whole")
    expected = records(tmp_path / "whole" / "run")
    rng, folder, kills = random.Random(5), tmp_path / "killed", 0
    for phase, number in KILLS.items():
        for kill in range(number):
            steps = (kill + 1) * len(expected) // (number + 2)
            longest = {"tokenizing": 0.3, "laying out": 1.0, "training": 0.2, "exporting": 0.001}[phase]
            kills += killed(folder, phase, steps, rng.uniform(0, longest))
    exported = finished(folder)
    found = records(folder / "run")
    assert [record["step"] for record in found] == list(range(len(expected)))
    for name in SAME:
        assert [record.get(name) for record in found] == [record.get(name) for record in expected], name
    assert exported == whole
    assert kills >= 17  # an export may be quicker than the one who kills it
