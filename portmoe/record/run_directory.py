"""Where a run lives: choosing the directory, holding it, and the files written once.

A run directory holds ``config.yaml`` (resolved), ``environment.json``, ``ops.json``, ``metrics.jsonl``, its
``chain.jsonl``, ``train.log``, ``checkpoints/`` and, with ``eval.prompts``, ``answers.jsonl``.
``status.json`` says how far the run is: running, finished, stopped (by a signal, its state saved where that
is enabled), aborted (by a second Ctrl-C), diverged or failed. ``.lock`` is held by rank 0 for as long as the
run lives: a run that is "running" and not held was killed.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from portmoe.checkpoint.folder import complete_steps
from portmoe.config import Config
from portmoe.config.keys import walk
from portmoe.config.read import dump_config, load_config
from portmoe.data.fingerprint import described
from portmoe.errors import ConfigError, PortmoeError, TrainingError
from portmoe.files import json_object, json_text, write_whole
from portmoe.record.lock import InUse, Lock, hold
from portmoe.record.writers import METRICS

RUNS = Path("runs")
STATES = ("running", "finished", "stopped", "aborted", "diverged", "failed")
CONFIG, STATUS = "config.yaml", "status.json"
ENVIRONMENT, OPERATIONS = "environment.json", "ops.json"
Data = Mapping[str, Mapping[str, Any]]  # split → what its data is, see ``data.fingerprint``


AGAIN = "if stopped, the same command goes on with it"


@dataclass
class RunDirectory:
    """One run's directory. Every rank has the paths; rank 0 writes and holds the lock.

    As a context it is closed on leaving; where that is by an error, the status says so.
    """

    path: Path
    checkpoints: Path
    resuming: bool  # it holds checkpoints of this run, and ckpt.auto_resume is on
    former: Config | None = None  # of the run that was here before
    origin: str = ""  # in words, why this directory; known on rank 0
    _lock: Lock | None = None
    _ended: bool = False

    @classmethod
    def open(
        cls, config: Config, config_name: str, data: Data, rank: int, broadcast: Callable[[Any], Any]
    ) -> "RunDirectory":
        """Choose and hold the directory; rank 0 looks, all ranks get the outcome.

        ``run.directory`` is taken if given, and continued if it holds this run. Without it the
        directory is the first of ``runs/<run.name or config_name>``, ``…-2``, ``…-3`` that is free or holds
        an unfinished, unlocked run of the same config to continue.

        Args:
            data: what the run trains on.
            broadcast: takes any picklable object and returns rank 0's on every rank.

        Raises:
            ConfigError: the directory given is in use, is not a writable directory, or holds a run
                of another config.
        """
        mine: RunDirectory | None = None
        outcome: tuple[Path, Path, bool, Config | None] | PortmoeError | None = None
        if rank == 0:
            try:
                mine = _choose(config, config_name, data)
                outcome = mine.path, mine.checkpoints, mine.resuming, mine.former
            except PortmoeError as error:
                outcome = error
            except OSError as error:
                outcome = _unusable(Path(config.run.directory or RUNS), error)
        outcome = broadcast(outcome)
        if isinstance(outcome, PortmoeError):
            raise outcome
        return mine or cls(*outcome)

    def write(self, name: str, text: str) -> None:
        """Write one file of the directory whole; on ranks other than 0 do nothing."""
        if self._lock is None:
            return
        _write(self.path / name, text)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one object as JSON, as ``write`` does."""
        self.write(name, json_text(content, indent=2) + "\n")

    def end(self, state: str) -> None:
        """Note how the run ended, as one of ``STATES``."""
        self._ended = True
        self.write_json(STATUS, {"state": state})

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._ended:
            with suppress(PortmoeError):  # the disk may be what failed
                self.end("aborted" if issubclass(kind, KeyboardInterrupt) else "failed")
        self.close()

    def close(self) -> None:
        """Let another run have the directory."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def warning(self) -> str | None:
        """What is not as safe here as it should be; known on rank 0."""
        return self._lock.warning if self._lock else None


def _choose(config: Config, config_name: str, data: Data) -> RunDirectory:
    if config.run.directory is not None:
        path = _given_path("run.directory", config.run.directory)
        try:
            lock = _hold(path)
        except InUse as holder:
            raise ConfigError(
                f"run.directory={str(path)!r} is in use by {holder}; wait for it or choose another one"
            ) from None
        try:
            return _enter(path, lock, config, data)
        except BaseException:
            lock.release()
            raise
    stem = re.sub(r"[^\w.\-]+", "_", config.run.name or config_name) or "run"
    number, why = 0, ""
    while True:
        number += 1
        path = RUNS / (stem if number == 1 else f"{stem}-{number}")
        if os.path.lexists(path) and not path.is_dir():
            continue
        try:
            lock = _hold(path)
        except InUse as holder:
            why = f"; {path} is in use by {holder}"
            continue
        taken = _taken(path, config, data)
        if taken is None:
            run = _enter(path, lock, config, data)
            run.origin += why
            return run
        why = f"; {path} {taken}"
        lock.release()


def _given_path(key: str, given: str) -> Path:
    try:
        path = Path(given).expanduser()
    except RuntimeError as error:  # ~name of no user
        raise ConfigError(f"{key}={given!r}: {error}; give the path of a directory") from None
    if os.path.exists(path) and not path.is_dir():
        raise ConfigError(f"{key}={given!r} is not a directory; give the path of one, existing or not")
    return path


def _hold(path: Path) -> Lock:
    """Create the directory and lock it; ``InUse`` if another process holds it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        return hold(path)
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error


def _taken(path: Path, config: Config, data: Data) -> str | None:
    """Why a run cannot go on or begin here without losing what is there; None where it can."""
    if not _has_history(path):
        return None
    former = _former_config(path)
    if former is None:
        return "holds a run without a config that can be read"
    if difference := first_difference(former, config, *_compared(path, config, data)):
        return f"differs in {difference[0]}"
    if is_finished(path):
        return "is finished"
    if not config.ckpt.auto_resume:
        return "is not continued: ckpt.auto_resume is false"
    return None if complete_steps(checkpoints_of(path, config)) else "has no checkpoint to go on from"


def _enter(path: Path, lock: Lock, config: Config, data: Data) -> RunDirectory:
    checkpoints = checkpoints_of(path, config)
    saved = bool(complete_steps(checkpoints))
    if saved or _has_history(path):
        _require_same_run(path, config, *_compared(path, config, data))
        _require_same_run(checkpoints, config, *_compared(path, config, data))
    if saved and not config.ckpt.auto_resume:
        raise ConfigError(
            f"ckpt.auto_resume=false, but {str(checkpoints)!r} holds checkpoints of a former run; set "
            "ckpt.auto_resume to true to continue it, or choose another run.directory"
        )
    origin = "continued" if saved else f"new: {AGAIN if config.ckpt.enable_save_ckpt else 'nothing is saved'}"
    run = RunDirectory(path, checkpoints, saved, _former_config(path) if saved else None, origin, lock)
    run.write(CONFIG, dump_config(config))
    if config.ckpt.saves and checkpoints.parent != path:  # say whose they are there too
        checkpoints.mkdir(parents=True, exist_ok=True)
        _write(checkpoints / CONFIG, dump_config(config))
    run.write_json(STATUS, {"state": "running"})
    return run


def _require_same_run(path: Path, config: Config, former_data: Data | None, data: Data | None) -> None:
    former = _former_config(path)
    difference = former and first_difference(former, config, former_data, data)
    if not difference:
        return
    key, there, here = difference
    if key == DATA:
        raise changed_data(str(path), there, here)
    raise ConfigError(
        f"{str(path)!r} holds a run with {key}={there!r}, and this config has {key}={here!r}; set {key} "
        f"to {there!r} to continue it, or choose another run.directory (ckpt.save_ckpt_folder)"
    )


DATA = "the training data"


def changed_data(whose: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> ConfigError:
    """The refusal of a run whose data is another than it was."""
    return ConfigError(
        f"{whose!r} was trained on other data so far: {described(there)}, and now it is {described(here)}. "
        f"Give it what it had (of the dummy data, data.num_samples={there['samples']}), choose another "
        "run.directory, or set ckpt.allow_changed_data to true: its steps then go on in the other data"
    )


def _compared(path: Path, config: Config, data: Data) -> tuple[Data | None, Data | None]:
    """What the data was and what it is; where a change is allowed, as if nothing had changed."""
    return (data, data) if config.ckpt.allow_changed_data else (_former_data(path), data)


def first_difference(
    former: Config, config: Config, former_data: Data | None = None, data: Data | None = None
) -> tuple[str, Any, Any] | None:
    """The first key that makes two configs different runs, with both values; None for the same run.

    Where both runs say what their training data is, that is compared and not what it is called.
    """
    known = bool(former_data and data)
    values = dict(_of_the_numbers(former, known))
    for key, value in _of_the_numbers(config, known):
        if values[key] != value:
            return key, values[key], value
    if known and former_data["train"] != data["train"]:
        return DATA, former_data["train"], data["train"]
    return None


def _of_the_numbers(config: Config, data_known: bool) -> Iterator[tuple[str, Any]]:
    """The keys that belong to the numbers, which a run keeps, and their values."""
    for entry in walk(config):
        judged_by_content = entry.key.of_the_data and data_known
        if entry.section is None and not entry.key.same_run and not judged_by_content:
            yield entry.path, entry.value


def _former_data(path: Path) -> Data | None:
    """What the run that was here trained on; None where it does not say."""
    try:
        return json.loads((path / ENVIRONMENT).read_text(encoding="utf-8")).get("data")
    except (OSError, ValueError, AttributeError):
        return None


def _former_config(path: Path) -> Config | None:
    """The config of the run that was here; None where it left none that can be read."""
    try:
        return load_config(path / CONFIG) if (path / CONFIG).is_file() else None
    except ConfigError:
        return None


def checkpoints_of(path: Path, config: Config) -> Path:
    """Where the run in ``path`` keeps its checkpoints."""
    folder = config.ckpt.save_ckpt_folder
    return path / "checkpoints" if folder is None else _given_path("ckpt.save_ckpt_folder", folder)


def _has_history(path: Path) -> bool:
    metrics = path / METRICS
    return (metrics.is_file() and metrics.stat().st_size > 0) or bool(complete_steps(path / "checkpoints"))


def is_finished(path: Path) -> bool:
    """Whether the run in a directory came to its end."""
    return json_object(path / STATUS).get("state") == "finished"


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written: {error.strerror}; free space or repair the disk"
        ) from error


def _unusable(path: Path, error: Exception) -> ConfigError:
    why = getattr(error, "strerror", None) or str(error)
    return ConfigError(
        f"run directory {str(path)!r} cannot be used: {why}; choose a writable one with run.directory"
    )
