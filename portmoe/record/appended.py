"""Files that grow by whole pieces; what the disk refuses is a ``TrainingError`` that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

from portmoe.errors import TrainingError


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what the disk refuses at ``path`` into an error with the way out."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror or error}; "
            "free space there, check its permissions, or choose another run.directory"
        ) from error


def hand_over(file: RawIOBase, content: bytes) -> None:
    """Hand all of ``content`` to the system.

    Raises:
        OSError: the disk refuses some of it.
    """
    rest = memoryview(content)
    while rest:  # a disk that fills up takes a part first
        rest = rest[file.write(rest) :]


class AppendedFile:
    """A text file where everything appended is handed to the system at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk(path):
            self._file = path.open("ab", buffering=0)

    def append(self, text: str) -> None:
        """Hand ``text`` to the system."""
        with disk(self._path):
            hand_over(self._file, text.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
