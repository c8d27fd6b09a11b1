"""Files written whole, on file systems of all kinds."""

import errno
import os

import pytest

from portmoe import files


def failing(code):
    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    return fsync


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_is_no_obstacle(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", failing(code))
    files.write_whole(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_one(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        files.write_whole(tmp_path / "file", "text")
    assert not (tmp_path / "file").exists()
