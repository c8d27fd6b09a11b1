"""Files written whole, and JSON that every reader takes."""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a process killed here, never meets half of it.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        sync(file.fileno())
    os.replace(partial, path)


def write_all(folder: Path, contents: Mapping[str, str]) -> list[Path]:
    """Write files, by name, into ``folder``, which may not exist yet, each whole; returns their paths.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        write_whole(folder / name, text)
    return [folder / name for name in contents]


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where the file is missing or holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sync(descriptor: int) -> None:
    """Put a file, or a folder's entries, on disk; later, where the file system cannot be asked to."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def json_text(value: Any, indent: int | None = None, words: bool = False) -> str:
    """Return ``value`` as strict JSON, without NaN and infinities; types it does not have become text.

    Args:
        words: write those numbers as "nan" and "inf"; otherwise they become null.
    """
    return json.dumps(strict(value, words), indent=indent, allow_nan=False, ensure_ascii=False, default=str)


def strict(value: Any, words: bool = False) -> Any:
    """Return ``value`` without the numbers that JSON does not have, see ``json_text``."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value) if words else None
    if isinstance(value, Mapping):
        return {key: strict(item, words) for key, item in value.items()}
    return [strict(item, words) for item in value] if isinstance(value, list | tuple) else value
