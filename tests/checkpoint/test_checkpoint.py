"""Checkpoints: what comes back equals a function of the step, whatever the layout, the kill or the damage."""

import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import checkpoint_worker as worker
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from portmoe.checkpoint import storage
from portmoe.checkpoint.folder import complete_steps, crc32, folder_of
from portmoe.checkpoint.store import Checkpointer, read
from portmoe.errors import ConfigError, TrainingError

WORKER = worker.__file__


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


def tensors_at(step):
    return {name: worker.full(name, step) for name in worker.SHAPES}


def save(folder, step, group, keep=2):
    checkpointer = Checkpointer(folder, keep, False, group)
    checkpointer.save(step, tensors_at(step), {"step": step})
    return checkpointer


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, group):
    """All scenarios of the worker on two ranks: their folder, and those that passed on both."""
    folder = tmp_path_factory.mktemp("two-ranks")
    save(folder / "of-one", 5, group)
    scenarios = {
        "save_two": folder / "of-two",
        "load_newest": folder / "of-one",
        "fail_on_rank_1": folder / "failing",
        "mismatch": folder / "mismatching",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, str(folder / "store"), *(f"{k}={v}" for k, v in scenarios.items())],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=200)[0].splitlines() for rank in ranks]
    return folder, {name for name in scenarios if all(f"passed {name}" in lines for lines in outputs)}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_was_saved_comes_back_and_only_the_newest_stay(tmp_path, group, asynchronous):
    checkpointer = Checkpointer(tmp_path, 2, asynchronous, group)
    tensors = tensors_at(0)
    for step in (1, 2, 3):
        for name, tensor in tensors.items():
            tensor.copy_(worker.full(name, step))
        checkpointer.save(step, tensors, {"step": step, "scale": 0.1, "none": None})
        for tensor in tensors.values():
            tensor.fill_(-1)  # training goes on while the write is in flight
    checkpointer.wait()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert checkpointer.latest() == 3
    step, state = checkpointer.resume(tensors, print)
    assert (step, state) == (3, {"step": 3, "scale": 0.1, "none": None})
    worker.check(tensors, 3)
    assert checkpointer.load(2, tensors)["step"] == 2
    worker.check(tensors, 2)
    checkpointer.close()


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path, group):
    checkpointer = Checkpointer(tmp_path / "missing", 2, True, group)
    assert checkpointer.latest() is None
    assert checkpointer.resume(tensors_at(0), print) is None


def test_a_checkpoint_holds_tensors_only_and_each_value_once(tmp_path, group):
    save(tmp_path, 1, group)
    metadata = dcp.FileSystemReader(folder_of(tmp_path, 1)).read_metadata()
    kinds = {type(entry) for entry in metadata.state_dict_metadata.values()}
    assert kinds == {TensorStorageMetadata}
    with pytest.raises(TypeError, match=r"tensors only.*count"):
        Checkpointer(tmp_path, 2, False, group).save(2, {"count": 3}, {})


def test_two_ranks_read_what_one_saved(two_ranks):
    assert "load_newest" in two_ranks[1]


def test_one_rank_reads_what_two_saved(two_ranks, group):
    folder, passed = two_ranks
    assert "save_two" in passed
    tensors = tensors_at(0)
    assert Checkpointer(folder / "of-two", 2, False, group).resume(tensors, print) == (2, {"step": 2})
    worker.check(tensors, 2)


def test_each_rank_writes_its_share_and_replicated_values_once(two_ranks):
    newest = folder_of(two_ranks[0] / "of-two", 2)
    assert len(list(newest.glob("*.distcp"))) == 2
    metadata = dcp.FileSystemReader(newest).read_metadata()
    written = [index.fqn for index in metadata.storage_data]
    assert sorted(name for name in written if name in ("copied", "plain", "scalar")) == [
        "copied",
        "plain",
        "scalar",
    ]
    assert written.count("rows") == 2


def test_a_full_disk_on_one_rank_is_named_on_all(two_ranks):
    assert "fail_on_rank_1" in two_ranks[1]


def test_another_shape_on_one_rank_is_refused_on_all(two_ranks):
    assert "mismatch" in two_ranks[1]


def test_a_failed_background_write_is_raised_by_the_next_call(tmp_path, group, monkeypatch):
    checkpointer = Checkpointer(tmp_path, 2, True, group)
    checkpointer.save(1, tensors_at(1), {"step": 1})
    checkpointer.wait()

    def full_disk(self, metadata, results):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(storage.Writer, "finish", full_disk)
    checkpointer.save(2, tensors_at(2), {"step": 2})
    with pytest.raises(TrainingError, match=r"step 2 could not be written.*No space left.*there: 1"):
        checkpointer.save(3, tensors_at(3), {"step": 3})
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    checkpointer.save(4, tensors_at(4), {"step": 4})  # the failure is told once, and then it goes on
    checkpointer.close()
    assert complete_steps(tmp_path) == [1, 4]


def test_a_background_write_keeps_what_was_at_the_call(tmp_path, group, monkeypatch):
    """Training goes on while the write waits for its turn, and changes tensors and state in place."""
    may_write = threading.Event()
    finish = storage.Writer.finish

    def late(*arguments, **named):
        may_write.wait(60)
        finish(*arguments, **named)

    monkeypatch.setattr(storage.Writer, "finish", late)
    tensors, state = tensors_at(3), {"progress": {"step": 3}}
    checkpointer = Checkpointer(tmp_path, 2, True, group)
    checkpointer.save(3, tensors, state)
    state["progress"]["step"] = 4
    for tensor in tensors.values():
        tensor.fill_(-1)
    may_write.set()
    checkpointer.wait()
    assert checkpointer.load(3, tensors) == {"progress": {"step": 3}}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, worker.full(name, 3))
    checkpointer.close()


def test_leftovers_of_killed_runs_go_and_everything_else_stays(tmp_path, group):
    save(tmp_path, 1, group)
    for name in ("step-00000002.partial", "step-00000003.removed", "step-00000009", "mine.partial"):
        (tmp_path / name).mkdir()
    # Killed between the two renames that replace a checkpoint: the former one is back.
    os.rename(folder_of(tmp_path, 1), tmp_path / "step-00000001.replaced")
    checkpointer = Checkpointer(tmp_path, 2, False, group)
    assert checkpointer.latest() == 1
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["mine.partial", "step-00000001", "step-00000009"]
    assert checkpointer.load(1, tensors_at(0)) == {"step": 1}


def test_a_partial_folder_of_another_layout_leaves_nothing_in_the_new_one(tmp_path, group):
    stale = tmp_path / "step-00000001.partial" / "__7_0.distcp"
    stale.parent.mkdir()
    stale.write_bytes(b"stale")
    save(tmp_path, 1, group)
    assert not (folder_of(tmp_path, 1) / stale.name).exists()


def test_saving_a_step_again_replaces_it(tmp_path, group):
    save(tmp_path, 3, group)
    tensors = tensors_at(8)
    checkpointer = Checkpointer(tmp_path, 1, False, group)
    checkpointer.save(3, tensors, {"step": "again"})
    loaded = tensors_at(0)
    assert checkpointer.resume(loaded, print) == (3, {"step": "again"})
    worker.check(loaded, 8)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000003"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped bit in the data": lambda folder: flip_a_bit(folder / "__0_0.distcp"),
    "truncated data": lambda folder: os.truncate(folder / "__0_0.distcp", 100),
    "missing data": lambda folder: (folder / "__0_0.distcp").unlink(),
    "truncated index": lambda folder: os.truncate(folder / ".metadata", 10),
    "missing index": lambda folder: (folder / ".metadata").unlink(),
    "empty state": lambda folder: (folder / "state.json").write_text(""),
    "state is a list": lambda folder: (folder / "state.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_loudly_for_the_older_one(tmp_path, group, damage):
    save(tmp_path, 1, group)
    checkpointer = save(tmp_path, 2, group)
    DAMAGES[damage](folder_of(tmp_path, 2))
    with pytest.raises(TrainingError, match="step-00000002 is damaged"):
        checkpointer.load(2, tensors_at(0))
    lines, tensors = [], tensors_at(0)
    assert checkpointer.resume(tensors, lines.append) == (1, {"step": 1})
    worker.check(tensors, 1)
    assert len(lines) == 1
    assert "step-00000002 is damaged" in lines[0]
    assert "going back to step 1" in lines[0]
    assert (tmp_path / "step-00000002.damaged").is_dir()
    assert checkpointer.latest() == 1


def test_a_run_does_not_silently_start_over_when_every_checkpoint_is_damaged(tmp_path, group):
    checkpointer = save(tmp_path, 1, group)
    flip_a_bit(folder_of(tmp_path, 1) / "__0_0.distcp")
    with pytest.raises(TrainingError, match=r"no checkpoint in .* can be read"):
        checkpointer.resume(tensors_at(0), lambda line: None)


def test_another_model_is_refused_by_name_and_touches_nothing(tmp_path, group):
    checkpointer = save(tmp_path, 1, group)
    tensors = tensors_at(0)
    tensors["rows"] = torch.zeros(7, 4)
    tensors["half"] = torch.zeros(3, 5)
    tensors["new"] = tensors.pop("plain")
    with pytest.raises(ConfigError) as refused:
        checkpointer.resume(tensors, print)
    for part in (
        "new is not in the checkpoint",
        "plain is not in this model",
        "rows is [7, 3] there and [7, 4] here",
        "half is torch.bfloat16 there and torch.float32 here",
    ):
        assert part in str(refused.value)
    assert torch.equal(tensors["even"], worker.full("even", 0))
    assert complete_steps(tmp_path) == [1]


def test_a_subset_of_the_tensors_can_be_read(tmp_path, group):
    save(tmp_path, 1, group)
    rows = {"rows": torch.zeros(7, 3)}
    assert read(folder_of(tmp_path, 1), rows, group, subset=True) == {"step": 1}
    worker.check(rows, 1)
    with pytest.raises(ConfigError, match="plain is not in this model"):
        read(folder_of(tmp_path, 1), rows, group)


def test_what_is_no_checkpoint_is_said_with_the_one_meant(tmp_path, group):
    save(tmp_path, 7, group)
    with pytest.raises(ConfigError, match=r"not a checkpoint.*did you mean .*step-00000007\?"):
        read(tmp_path, tensors_at(0), group)
    for nothing in (tmp_path / "missing", folder_of(tmp_path, 7) / "state.json"):
        with pytest.raises(ConfigError, match="is not a checkpoint"):
            read(nothing, tensors_at(0), group)


class Exploit:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def test_an_index_that_would_run_code_is_refused(tmp_path, group):
    checkpointer = save(tmp_path, 1, group)
    folder = folder_of(tmp_path, 1)
    (folder / ".metadata").write_bytes(pickle.dumps(Exploit(tmp_path / "witness")))
    record = json.loads((folder / "state.json").read_text())
    record["files"][".metadata"] = crc32(folder / ".metadata")
    (folder / "state.json").write_text(json.dumps(record))
    with pytest.raises(TrainingError, match="does not belong in a checkpoint's metadata"):
        checkpointer.load(1, tensors_at(0))
    assert not (tmp_path / "witness").exists()


def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, WORKER, "kill_and_resume", str(folder), "12"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("resumed")]
    assert len(resumed) >= 10
    assert resumed == sorted(resumed)  # no kill lost a checkpoint that was complete
    assert resumed[-1] > 0
    assert any(".partial" in line for line in done.stdout.splitlines())  # kills did fall into saves
