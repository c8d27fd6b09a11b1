"""What a whole run leaves behind, started as a user starts it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from run_portmoe import arguments, environment, losses, records, run
from zygote import portmoe

from portmoe.backends.cpu.compiler import kernels
from portmoe.config.read import load_config
from portmoe.training.run import what_follows

# The command, and what of torch's compiler it has imported.
WATCHED = """
import sys
from portmoe.cli.main import run
code = run(sys.argv[1:])
print("imported:", *sorted({"torch._dynamo", "torch._inductor", "triton"} & sys.modules.keys()))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run in a process of its own: its directory and what it printed."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    line = arguments(
        directory,
        data__total_steps=6,
        data__valid_every=3,
        data__valid_micro_num=2,
        ckpt__enable_save_ckpt=True,
        ckpt__checkpoint_every=2,
        ckpt__keep=2,
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *line], env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done.stdout


@pytest.fixture(scope="module")
def finished(started):
    return started[0]


def test_a_run_of_one_rank_does_not_wait_for_torchs_compiler_to_be_imported(started):
    """It takes as long as all the rest of the start."""
    assert started[1].splitlines()[-1] == "imported:"


def test_the_run_directory_is_complete(finished):
    names = {entry.name for entry in finished.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "ops.json",
        "metrics.jsonl",
        "train.log",
        "checkpoints",
    } <= names
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert {"torch", "numpy"} <= json.loads((finished / "environment.json").read_text())["packages"].keys()


def test_every_operation_is_recorded_with_its_candidates(finished):
    record = json.loads((finished / "ops.json").read_text())
    compiles = not isinstance(kernels(), str) and torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert record["attention"]["chosen"] == ("compiled" if compiles else "sdpa")
    idle = {name for name, choice in record.items() if choice["chosen"] is None}
    assert idle == {
        "swiglu",
        "megablock_gating",
        "softmax_gating",
        "expert_ffn_ragged",
    }  # every layer has experts in static buffers
    for name, choice in record.items():
        chosen = [] if name in idle else [choice["chosen"]]
        assert [c["name"] for c in choice["candidates"] if c["chosen"]] == chosen
        assert all(candidate["reason"] for candidate in choice["candidates"])


def test_only_the_newest_checkpoints_stay(finished):
    assert sorted(entry.name for entry in (finished / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]


def test_one_record_a_step_and_validations_where_due(finished):
    metrics = records(finished)
    assert [record["step"] for record in metrics] == list(range(6))
    assert [record["step"] for record in metrics if "valid_loss" in record] == [2, 5]
    # untrained guessing over 512 tokens is ln 512 = 6.24; six steps of warm-up change it little
    assert all(4 < record["valid_loss"] < 6.5 for record in metrics if "valid_loss" in record)


def test_a_finished_run_is_not_trained_again(finished):
    before = (finished / "metrics.jsonl").read_bytes()
    settings = {"data__total_steps": 6, "data__valid_every": 3, "data__valid_micro_num": 2}
    run(finished, **settings, ckpt__enable_save_ckpt=True, ckpt__checkpoint_every=2)
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert "finished: nothing is left to do (data.total_steps is 6)" in (finished / "train.log").read_text()


def test_more_steps_continue_a_finished_run(finished):
    metrics = run(finished, data__total_steps=8, ckpt__enable_save_ckpt=True, lr_scheduler__total_steps=6)
    assert [record["step"] for record in metrics] == list(range(8))


@pytest.mark.parametrize(
    ("config", "keys", "commands"),
    [
        (
            "tiny_mixtral_chat_full_facts_e3",
            [],
            ["portmoe chat 'a run'", "portmoe export 'a run' --out FOLDER"],
        ),
        ("tiny_mixtral", ["data.tokenizer=bytes"], ["portmoe export 'a run' --out FOLDER"]),
        ("7b_moe4", ["data.total_steps=60"], ["portmoe report 'a run'"]),
        ("tiny_moe4", [], []),
    ],
)
def test_what_a_finished_run_is_for(config, keys, commands):
    assert list(what_follows(load_config(config, keys), Path("a run"))) == commands


def test_steps_passed_over_are_not_trained(tmp_path):
    saving = {"ckpt__enable_save_ckpt": True, "ckpt__checkpoint_every": 2, "ckpt__keep": 9}
    metrics = run(
        tmp_path / "run", data__total_steps=6, data__skip_batches="1,3-4", data__valid_every=2, **saving
    )
    assert [record["step"] for record in metrics] == [0, 2, 5]
    # What was due after steps 1 and 3 is saved there and validated with the next step that is trained.
    assert [record["step"] for record in metrics if "valid_loss" in record] == [2, 5]
    saved = sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in (2, 4, 6)]


def test_another_global_batch_is_refused_on_resume(tmp_path):
    settings = {"ckpt__enable_save_ckpt": True, "data__total_steps": 2}
    run(tmp_path / "run", **settings)
    settings |= {"data__total_steps": 4, "data__global_batch_size": 8}
    done = portmoe(arguments(tmp_path / "run", **settings), environment())
    assert done.returncode == 2
    assert "data.global_batch_size" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_of_another_run_are_a_starting_point(tmp_path):
    saving = {"ckpt__enable_save_ckpt": True}
    first = run(tmp_path / "first", data__total_steps=4, **saving)
    path = str(tmp_path / "first" / "checkpoints" / "step-00000004")
    weights = run(tmp_path / "weights", data__total_steps=1, ckpt__load_ckpt_info={"path": path})
    everything = run(
        tmp_path / "all",
        data__total_steps=6,
        lr_scheduler__total_steps=4,
        ckpt__load_ckpt_info={"path": path, "content": ["all"]},
    )
    assert [record["step"] for record in everything] == [4, 5]
    # the trained weights do better on the first batch than the new ones did
    assert losses(weights)[0] < losses(first)[0] - 0.05


def test_a_model_larger_than_memory_is_refused(tmp_path):
    done = portmoe(arguments(tmp_path / "run", model__hidden_size=2**20), environment())
    assert done.returncode == 3
    assert "GiB" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_batch_without_labels_has_no_loss_and_a_run_of_them_ends(tmp_path):
    """Every second token is negative, which is read as its absolute value and never learned."""
    (tmp_path / "data").mkdir()
    line = json.dumps({"tokens": [-token for token in range(1, 33)]}).encode() + b"\n"
    (tmp_path / "data" / "part.bin").write_bytes(line * 60)
    rows = np.array([(i * len(line), 32) for i in range(60)])
    with (tmp_path / "data" / "part.bin.meta").open("wb") as file:
        np.save(file, rows)
    masked = {"data__train_folder": str(tmp_path / "data"), "data__min_length": 0}
    done = portmoe(arguments(tmp_path / "run", **masked), environment())
    assert done.returncode == 4, done.stderr
    assert "from step 0 on 5 steps in a row made no progress: no token of the step has a label" in done.stderr
    assert [record["loss"] for record in records(tmp_path / "run")] == [None] * 5


def test_other_ranks_with_dummy_data_by_the_rank_are_told_what_to_set(tmp_path):
    saving = {"ckpt__enable_save_ckpt": True, "data__num_samples": None}
    run(tmp_path / "run", data__total_steps=2, **saving)
    environment_json = tmp_path / "run" / "environment.json"
    known = json.loads(environment_json.read_text())
    assert known["data"]["train"]["samples"] == 500
    more = {"data__total_steps": 4, **saving} | {"data__num_samples": 700}
    done = portmoe(arguments(tmp_path / "run", **more), environment())
    assert done.returncode == 2
    assert "data.num_samples=500" in done.stderr
    environment_json.write_text(json.dumps({**known, "data": None}))  # the checkpoint knows it too
    named = {**more, "data__num_samples": None}
    with_500 = portmoe(arguments(tmp_path / "run", **named | {"data__num_samples": None}), environment())
    assert with_500.returncode == 0, with_500.stderr
    assert "the learning rate of step 2 is" in (tmp_path / "run" / "train.log").read_text()
    grown = {**more, "data__total_steps": 6, "ckpt__allow_changed_data": True}
    done = portmoe(arguments(tmp_path / "run", **grown), environment())
    assert done.returncode == 0, done.stderr
    assert "the data changed at step 4: 500 samples" in (tmp_path / "run" / "train.log").read_text()
