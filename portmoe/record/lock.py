"""One run at a time in a directory, also on file systems that cannot lock.

The kernel's lock ends with its holder and is taken where it can be had. A file system without it (network
file systems mounted so) gets a file that only one process can create, with who that is: it outlives a killed
run, so its holder touches it now and then, and one that is dead or silent for long has lost it.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

LOCK, HOLDER = ".lock", ".lock-holder"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
TOUCHED_EVERY, LOST_AFTER = 20.0, 120.0  # seconds


class Lock:
    """A held directory. ``warning``: what is not as safe as it should be, or None."""

    def __init__(self, file: IO[bytes], holder: "_Holder | None" = None) -> None:
        self._file, self._holder = file, holder
        self.warning = holder and (
            f"this file system cannot lock files: {holder.path} keeps other runs out instead, and one that "
            f"is killed on another host keeps its directory for {LOST_AFTER:.0f} s"
        )

    def release(self) -> None:
        """Let others have the directory."""
        if self._holder:
            self._holder.release()
        self._file.close()


class InUse(Exception):
    """Another process holds the directory; the message says which, where that is known."""


def hold(directory: Path) -> Lock:
    """Hold ``directory``, which exists.

    Raises:
        InUse: another process does.
        OSError: nothing can be written there.
    """
    file = open(directory / LOCK, "ab")  # noqa: SIM115 (kept open: closing it releases the lock)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse("another run") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return Lock(file, _Holder(directory / HOLDER))
        if _alive(directory / HOLDER):  # someone came before the file system could lock
            raise InUse(_who(directory / HOLDER))
        return Lock(file)
    except BaseException:
        file.close()
        raise


def in_use(directory: Path) -> bool:
    """Whether a process holds ``directory``; where that cannot be asked: no. Holds it for an instant."""
    if (directory / HOLDER).exists() and _alive(directory / HOLDER):
        return True
    try:
        with open(directory / LOCK, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class _Holder:
    """The file of one holder, touched until it is released."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._me = json.dumps({**_identity(), "token": uuid.uuid4().hex})
        self._take()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="portmoe-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        with suppress(OSError):
            if self.path.read_text(encoding="utf-8") == self._me:
                self.path.unlink()

    def _take(self) -> None:
        while True:
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                if _alive(self.path):
                    raise InUse(_who(self.path)) from None
                self._set_aside()
                continue
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self._me)
            return

    def _set_aside(self) -> None:
        """Remove what a dead holder left: of several that find it dead, the one whose rename succeeds."""
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if _alive(aside):  # another one was quicker, and this is its new file
                with suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _touch(self) -> None:
        while not self._released.wait(TOUCHED_EVERY):
            with suppress(OSError):
                os.utime(self.path)


def _identity() -> dict[str, Any]:
    """This process, so that another on the same machine can see whether it still runs."""
    return {
        "host": socket.gethostname(),
        "machine": f"{_text('/proc/sys/kernel/random/boot_id')} {_link('/proc/self/ns/pid')}",
        "pid": os.getpid(),
        "began": _began(os.getpid()),
    }


def _alive(path: Path) -> bool:
    """Whether the holder named in the file still runs; one that cannot be asked counts by its last touch."""
    try:
        silent = _now(path.parent) - path.stat().st_mtime
    except OSError:
        return False
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        same_machine = holder["machine"] == _identity()["machine"] and holder["machine"].strip()
        pid, began = holder["pid"], holder["began"]
    except (OSError, ValueError, KeyError, TypeError):
        return silent < LOST_AFTER  # being written, or not ours
    if same_machine:
        return began is not None and _began(pid) == began
    return silent < LOST_AFTER


def _now(directory: Path) -> float:
    """Tell the time by the clock of the file system, which may be another machine's."""
    try:
        os.utime(directory / LOCK)
        return (directory / LOCK).stat().st_mtime
    except OSError:
        return time.time()


def _who(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} (by {path})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"another run (by {path})"


def _began(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks: ids are used again. None: it has ended."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
