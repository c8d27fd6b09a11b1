"""Old checkpoints and leftovers go, whatever people made of them; what cannot go is told."""

import os
import shutil

import checkpoint_worker as worker
import pytest
import torch.distributed as dist

from portmoe.checkpoint import upkeep
from portmoe.checkpoint.folder import complete_steps, folder_of
from portmoe.checkpoint.store import Checkpointer


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


def save(checkpointer, *steps):
    for step in steps:
        checkpointer.save(step, {name: worker.full(name, step) for name in worker.SHAPES}, {"step": step})
    checkpointer.wait()
    return checkpointer


def move_away(checkpoint, disk):
    shutil.move(checkpoint, disk)
    checkpoint.symlink_to(disk)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_of_a_checkpoint_moved_to_another_disk_the_link_goes(tmp_path, group, asynchronous):
    folder, disk = tmp_path / "checkpoints", tmp_path / "disk"
    move_away(folder_of(save(Checkpointer(folder, 2, False, group), 2, 4).folder, 2), disk)
    checkpointer = Checkpointer(folder, 2, asynchronous, group)
    assert checkpointer.latest() == 4
    save(checkpointer, 6, 8)
    assert complete_steps(folder) == [6, 8]
    assert (disk / "state.json").exists()
    assert sorted(os.listdir(folder)) == ["step-00000006", "step-00000008"]
    assert checkpointer.problems() == []
    checkpointer.close()


def in_the_way(path, kind, tmp_path):
    """Put at ``path`` what someone may have left there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
        (path / "file").write_text("mine")
    elif kind == "link":
        (tmp_path / "kept").mkdir(exist_ok=True)
        (tmp_path / "kept" / "file").write_text("mine")
        path.symlink_to(tmp_path / "kept")
    else:
        path.symlink_to(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
@pytest.mark.parametrize("ending", ["partial", "removed", "replaced"])
def test_whatever_lies_in_the_way_of_a_save(tmp_path, group, kind, ending):
    folder = tmp_path / "checkpoints"
    checkpointer = save(Checkpointer(folder, 2, False, group), 2, 4)
    in_the_way(folder / f"step-00000002.{ending}", kind, tmp_path)
    in_the_way(folder / f"step-00000006.{ending}", kind, tmp_path)
    assert checkpointer.latest() == 4  # as at the start of a run
    save(checkpointer, 6, 6)
    assert complete_steps(folder) == [4, 6]
    assert sorted(os.listdir(folder)) == ["step-00000004", "step-00000006"]
    if kind == "link":
        assert (tmp_path / "kept" / "file").read_text() == "mine"


def test_a_link_where_the_new_checkpoint_belongs_is_replaced(tmp_path, group):
    folder = tmp_path / "checkpoints"
    checkpointer = save(Checkpointer(folder, 2, False, group), 2, 4)
    move_away(folder_of(folder, 4), tmp_path / "disk")
    in_the_way(folder_of(folder, 6), "dangling link", tmp_path)
    save(checkpointer, 4, 6)
    assert complete_steps(folder) == [4, 6]
    assert not any(entry.is_symlink() for entry in folder.iterdir())
    assert (tmp_path / "disk" / "state.json").exists()


def test_what_cannot_be_removed_is_told_each_time_and_ends_nothing(tmp_path, group, monkeypatch):
    folder = tmp_path / "checkpoints"

    def refused(path, *_, rmtree=shutil.rmtree, **__):
        if path.name.startswith("step-00000002"):
            raise PermissionError(1, "Operation not permitted", f"{path}/inside")
        rmtree(path)

    checkpointer = save(Checkpointer(folder, 2, False, group), 2, 4)
    monkeypatch.setattr(upkeep.shutil, "rmtree", refused)
    save(checkpointer, 6)
    assert complete_steps(folder) == [4, 6]
    (told,) = checkpointer.problems()
    assert str(folder / "step-00000002.removed") in told
    assert "Operation not permitted" in told
    assert checkpointer.latest() == 6
    assert len(checkpointer.problems()) > 0
    assert checkpointer.problems() == []


def test_the_checkpoint_before_the_newest_stays_until_a_step_from_the_newest_was_good(tmp_path, group):
    checkpointer = save(Checkpointer(tmp_path, 1, False, group), 2, 4)
    assert complete_steps(tmp_path) == [2, 4]
    checkpointer.confirm()
    assert complete_steps(tmp_path) == [4]
    checkpointer.confirm()
    save(checkpointer, 6)
    assert complete_steps(tmp_path) == [4, 6]
