"""Configs of other programs, Python files, carried over without executing them."""

import os

from portmoe.config import internevo, xtuner
from portmoe.config.imported import Imported
from portmoe.config.literals import read_assignments
from portmoe.config.read import read_text


def import_config(path: str | os.PathLike[str]) -> Imported:
    """Read the Python config at ``path``, of whichever program it is.

    Raises:
        ConfigError: the file cannot be read, a key of ours is computed in a way that is not read, it
            configures a model that is not trained here, or the keys contradict each other.
    """
    source = os.fspath(path)
    found = read_assignments(read_text(source, packaged=False).removeprefix("\ufeff"), source)
    program = xtuner if xtuner.is_config(found.names) else internevo
    return program.carried_over(source, found)
