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
