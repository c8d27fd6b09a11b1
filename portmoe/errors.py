"""The errors a user can cause or meet, each with the exit code the command line ends with.

Messages name the key, the value, what is allowed and the fix. Anything that is not a
``PortmoeError`` is a defect in portmoe and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PortmoeError(Exception):
    """Base of every error that is shown as one message, without a traceback."""

    exit_code = 1


class ConfigError(PortmoeError):
    """A config file, an override or a command line that cannot be used."""

    exit_code = 2


class BackendError(PortmoeError):
    """The machine lacks what the chosen backend needs: device, driver, package, launcher."""

    exit_code = 3


class TrainingError(PortmoeError):
    """Training began and could not go on."""

    exit_code = 4


@contextmanager
def written_to(out: Path, fix: str = "") -> Iterator[None]:
    """Turn what the disk refuses at ``--out`` into a ``ConfigError``, with the way out where there is one."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be written: {error.strerror}{fix}") from error
