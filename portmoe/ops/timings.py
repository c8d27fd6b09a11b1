"""Measured seconds of implementations, kept on disk between runs.

A timing belongs to one device model, torch version, number of threads and workload; a run with another
of these measures anew. The file is a cache: deleting it costs only the time to measure again.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

import torch

from portmoe.cache import cache_folder
from portmoe.files import json_text
from portmoe.ops.measure import seconds_per_call
from portmoe.ops.operation import Implementation, Operation
from portmoe.ops.workload import Workload

Log = Callable[[str], None]


def cache_file() -> Path | None:
    """Where timings are kept; None where this user has no cache directory."""
    try:
        return cache_folder() / "timings.json"
    except OSError:
        return None


class Timings:
    """Timings known before, and those measured since.

    Args:
        device: the device's model name, as its backend gives it.
        known: case → implementation → seconds.
        path: the file they are kept in; None: nowhere.
        synchronize: waits for all work submitted to the device (``Device.synchronize``); by default there is
            nothing to wait for, as where the host computes.
    """

    def __init__(
        self,
        device: str,
        known: Mapping[str, Mapping[str, float]] | None = None,
        path: Path | None = None,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self.known = {case: dict(by_name) for case, by_name in (known or {}).items()}
        self._device = device
        self._path = path
        self._synchronize = synchronize
        self._changed = False

    @classmethod
    def load(
        cls, device: str, path: Path | None, log: Log, synchronize: Callable[[], None] = lambda: None
    ) -> "Timings":
        """The timings in ``path``; a file that cannot be read as such is passed over and told to ``log``."""
        if path is None:
            log("timings are measured anew in every run: there is no home directory to keep them in")
            return cls(device, synchronize=synchronize)
        try:
            known = _checked(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            known = {}
        except (OSError, ValueError, RecursionError) as error:
            log(f"the timings in {path} cannot be used and are measured again: {error}")
            known = {}
        return cls(device, known, path, synchronize)

    def seconds(self, operation: Operation, implementation: Implementation, workload: Workload) -> float:
        """How long one forward and backward takes, measured if not known. Raises what the call raises."""
        case = self.known.setdefault(self._case(operation.name, workload), {})
        if implementation.name not in case:
            case[implementation.name] = seconds_per_call(
                operation, implementation.function, workload, self._synchronize
            )
            self._changed = True
        return case[implementation.name]

    def save(self, log: Log) -> None:
        """Put the file in place in one move, if anything was measured; failing that is only told."""
        if not self._changed or self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=self._path.parent, prefix="timings-", delete=False
            ) as file:
                file.write(json_text(self.known, indent=1))
            os.replace(file.name, self._path)
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be written
            log(f"the measured timings were not kept: {error}")

    def _case(self, operation: str, workload: Workload) -> str:
        """What a timing depends on, in words."""
        sizes = {f.name: getattr(workload, f.name) for f in fields(workload) if f.name != "device"}
        device = f"{workload.device.type} {self._device}, {torch.get_num_threads()} threads"
        where = f"{operation} on {device}, torch {torch.__version__}"
        return where + "".join(f", {name}={value}" for name, value in sizes.items())


def _checked(document: object) -> dict[str, dict[str, float]]:
    """``document`` if it is what ``save`` writes; a ValueError otherwise."""
    if not isinstance(document, dict):
        raise ValueError("not an object of cases")
    for case, by_name in document.items():
        if not isinstance(by_name, dict):
            raise ValueError(f"{case!r} holds no object of implementations")
        for name, seconds in by_name.items():
            if isinstance(seconds, bool) or not isinstance(seconds, int | float):
                raise ValueError(f"{seconds!r} is no number of seconds for {name!r}")
            if not 0 < seconds < math.inf:
                raise ValueError(f"{seconds!r} is no time {name!r} can take")
    return document
