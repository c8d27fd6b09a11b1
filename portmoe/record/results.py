"""What a run has recorded, for programs."""

from pathlib import Path
from typing import Any

from portmoe.errors import ConfigError
from portmoe.record import writers


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The records of every step of a run, in order: flat dicts, by the columns of ``metrics.jsonl``.

    A line that a crash left half written ends them; what a former version wrote has this one's names.

    Args:
        run: its directory, or its ``metrics.jsonl``.

    Raises:
        ConfigError: there is none.
    """
    path = Path(run)
    path = path / writers.METRICS if path.is_dir() else path
    try:
        return list(writers.read_metrics(path))
    except OSError as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read: {error.strerror}; name the directory of a run"
        ) from error
