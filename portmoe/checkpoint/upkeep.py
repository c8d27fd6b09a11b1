"""What is removed from a folder of checkpoints: old ones and what killed runs left over.

People move checkpoints to other disks and leave links, and files may belong to others. A link is removed and
never what it points to; what cannot be removed is told and stays, for it takes room but spoils nothing.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

_LEFTOVER = re.compile(r"step-\d{8,}\.(partial|(replaced|removed)(\.\d+)?)")
_REPLACED = re.compile(r"(step-\d{8,})\.replaced(\.\d+)?")
MOST_NAMES = 100


def clear(path: Path) -> None:
    """Remove the folder, the file or the link that ``path`` is, if anything.

    Raises:
        OSError: it cannot be removed; the message names what is in the way.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path
        raise OSError(f"{path} cannot be removed: {where}: {error.strerror or error}") from error


def vacant(path: Path) -> Path:
    """``path``, emptied, or where that cannot be, the same name with the first free number behind it.

    Raises:
        OSError: nothing of that name can be removed.
    """
    for number in count():
        candidate = path.with_name(f"{path.name}.{number}") if number else path
        try:
            clear(candidate)
            return candidate
        except OSError:
            if number == MOST_NAMES:
                raise
    raise AssertionError("count() does not end")


def remove(checkpoints: Iterable[Path], told: Callable[[str], None]) -> None:
    """Remove whole checkpoints. A half-removed one never looks complete."""
    for checkpoint in checkpoints:
        try:
            if checkpoint.is_symlink():
                checkpoint.unlink()
                continue
            doomed = vacant(checkpoint.with_suffix(".removed"))
            os.replace(checkpoint, doomed)
            clear(doomed)
        except OSError as error:
            told(f"an old checkpoint stays: {_words(error)}")


def tidy(folder: Path, told: Callable[[str], None]) -> None:
    """Remove what killed runs left over, and bring back the checkpoint one of them was replacing."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for former in entries:
        # Killed between the two renames that replace a checkpoint, a run left only the former one.
        match = _REPLACED.fullmatch(former.name)
        if match and not os.path.lexists(former.with_name(match[1])):
            os.replace(former, former.with_name(match[1]))
    for entry in entries:
        if _LEFTOVER.fullmatch(entry.name):
            try:
                clear(entry)
            except OSError as error:
                told(f"a leftover of a killed run stays: {_words(error)}")


def _words(error: OSError) -> str:
    return str(error) if error.strerror is None else f"{error.filename}: {error.strerror}"
