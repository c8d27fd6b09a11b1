"""One run at a time in a directory, with and without a file system that can lock."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from portmoe.record import lock
from portmoe.record.lock import HOLDER, InUse, hold

WITHOUT = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture(params=[None, *WITHOUT], ids=lambda code: errno.errorcode.get(code, "flock"))
def _file_system(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(fcntl, "flock", refusing(request.param))


@pytest.fixture
def _no_locks(monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS))


def refusing(code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    return flock


@pytest.mark.usefixtures("_file_system")
def test_one_holder_at_a_time(tmp_path):
    first = hold(tmp_path)
    with pytest.raises(InUse):
        hold(tmp_path)
    first.release()
    again = hold(tmp_path)
    again.release()
    assert not (tmp_path / HOLDER).exists()


@pytest.mark.usefixtures("_no_locks")
def test_the_other_lock_is_told_and_names_its_holder(tmp_path):
    held = hold(tmp_path)
    assert "cannot lock files" in held.warning
    with pytest.raises(InUse, match=f"process {os.getpid()} on "):
        hold(tmp_path)
    held.release()


def test_a_disk_that_fails_is_not_one_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        hold(tmp_path)


@pytest.mark.usefixtures("_no_locks")
def test_a_killed_holder_has_lost_it(tmp_path):
    """The process is gone, so its id says nothing: it may be another's by now."""
    code = (
        "import errno, fcntl, os; from pathlib import Path; from portmoe.record.lock import hold\n"
        "def flock(*_): raise OSError(errno.ENOSYS, '')\n"
        f"fcntl.flock = flock; held = hold(Path({str(tmp_path)!r})); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (tmp_path / HOLDER).exists()
    held = hold(tmp_path)
    held.release()
    former = json.loads(lock.json.dumps(lock._identity() | {"began": "1", "token": ""}))
    (tmp_path / HOLDER).write_text(json.dumps(former))  # this process's id, used again
    hold(tmp_path).release()


@pytest.mark.usefixtures("_no_locks")
@pytest.mark.parametrize(
    "content", ['{"machine": "other", "host": "node7", "pid": 1, "began": "1"}', "", "{"]
)
def test_a_holder_elsewhere_is_believed_while_it_gives_signs_of_life(tmp_path, content):
    (tmp_path / lock.LOCK).touch()
    (tmp_path / HOLDER).write_text(content)
    with pytest.raises(InUse, match="node7" if "node7" in content else HOLDER):
        hold(tmp_path)
    silent = (tmp_path / HOLDER).stat().st_mtime - 2 * lock.LOST_AFTER
    os.utime(tmp_path / HOLDER, (silent, silent))
    hold(tmp_path).release()


@pytest.mark.usefixtures("_no_locks")
def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCHED_EVERY", 0.01)
    held = hold(tmp_path)
    os.utime(tmp_path / HOLDER, (0, 0))
    for _ in range(500):
        if (tmp_path / HOLDER).stat().st_mtime:
            break
        lock.time.sleep(0.01)
    assert (tmp_path / HOLDER).stat().st_mtime
    held.release()


@pytest.mark.usefixtures("_no_locks")
def test_of_two_that_find_a_dead_holder_one_gets_the_directory(tmp_path, monkeypatch):
    """The second renames away what the first has just made, sees that it lives and puts it back."""
    (tmp_path / lock.LOCK).touch()
    (tmp_path / HOLDER).write_text('{"machine": "other", "host": "node7", "pid": 1, "began": "1"}')
    os.utime(tmp_path / HOLDER, (0, 0))
    alive, others = lock._alive, []

    def quicker(path):
        found = alive(path)
        if not found and not others and path.name == HOLDER:
            others.append(None)
            others[0] = hold(tmp_path)
        return found

    monkeypatch.setattr(lock, "_alive", quicker)
    with pytest.raises(InUse):
        hold(tmp_path)
    assert (tmp_path / HOLDER).exists()
    others[0].release()
