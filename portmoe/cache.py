"""The user's cache directory, which every run can do without."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where portmoe keeps what it can make again, by the XDG base directory specification. Not created.

    Raises:
        OSError: there is no such place: neither XDG_CACHE_HOME nor a home directory is known.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the specification has relative paths ignored
        return Path(given, "portmoe")
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and no entry of this user in the password database
        home = Path()
    if not home.is_absolute():
        raise OSError("there is no home directory to keep a cache in: set XDG_CACHE_HOME or HOME")
    return home / ".cache" / "portmoe"
