"""The folders of checkpoints: their names, which are whole, and the checksums of their files.

Without torch, so that looking for a run to continue is quick.
"""

import os
import re
import zlib
from collections.abc import Collection
from pathlib import Path

from portmoe.files import sync

STATE_FILE = "state.json"
METADATA_FILE = ".metadata"

_COMPLETE = re.compile(r"step-(\d{8,})")


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies inside ``folder``."""
    return folder / f"step-{step:08d}"


def complete_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in ``folder``, ascending. Looks only; communicates nothing."""
    if not folder.is_dir():
        return []
    names = [
        match
        for entry in folder.iterdir()
        if (match := _COMPLETE.fullmatch(entry.name)) and (entry / STATE_FILE).is_file()
    ]
    return sorted(int(match[1]) for match in names)


def beyond(folder: Path, newest: int, keep: int, always: Collection[int] = ()) -> list[Path]:
    """The complete checkpoints up to step ``newest`` that are not among its ``keep`` newest.

    Args:
        always: steps whose checkpoints stay and do not count.
    """
    steps = [step for step in complete_steps(folder) if step <= newest and step not in always]
    return [folder_of(folder, step) for step in steps[:-keep]]


def partial_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` is while it is written."""
    return folder_of(folder, step).with_suffix(".partial")


def crc32(path: Path) -> int:
    """Return the checksum of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def sync_folder(folder: Path) -> None:
    """Put the folder's entries on disk, so that a machine crash cannot lose a file that was synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
