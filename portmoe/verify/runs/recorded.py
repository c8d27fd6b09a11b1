"""A run directory, read: what comparisons of runs start from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portmoe.config import Config
from portmoe.config.read import load_config
from portmoe.data.fingerprint import described
from portmoe.errors import ConfigError
from portmoe.record import acceptance
from portmoe.record.run_directory import CONFIG, DATA, ENVIRONMENT, first_difference
from portmoe.record.writers import METRICS, read_metrics


@dataclass(frozen=True)
class Run:
    """One run directory, read."""

    path: Path
    config: Config
    backend: str  # "unknown" where environment.json is missing
    ranks: int
    steps: list[dict[str, Any]]
    data: Mapping[str, Any] | None = None  # what it was trained on; older runs do not say
    command: str | None = None  # that trained it, as a person typed it

    @property
    def name(self) -> str:
        """The run as reports name it: where it lies and what made it."""
        return f"{self.path} ({self.backend}, {self.ranks} rank{'s' if self.ranks != 1 else ''})"

    @property
    def on_dummy_data(self) -> bool:
        """Whether the benchmark's acceptance applies to it."""
        return acceptance.applies(self.config)

    def at(self, steps: "list[int]") -> list[dict[str, Any]]:
        """The records of these steps."""
        by_step = {record["step"]: record for record in self.steps}
        return [by_step[step] for step in steps]


def read_run(path: Path) -> Run:
    """A run directory, finished or not.

    Raises:
        ConfigError: it holds no run, or none that has made a step.
    """
    for name in (CONFIG, METRICS):
        if not (path / name).is_file():
            raise ConfigError(
                f"{str(path)!r} has no {name}; give the directory of a run, as `portmoe train` left it"
            )
    steps = list(read_metrics(path / METRICS))
    if not steps:
        raise ConfigError(f"{str(path / METRICS)!r} holds no complete step; let the run make some")
    try:
        environment = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = {}
    return Run(
        path,
        load_config(path / CONFIG),
        environment.get("backend", "unknown"),
        environment.get("ranks", 1),
        steps,
        environment.get("data"),
        environment.get("command"),
    )


def require_same_run(first: Run, second: Run) -> None:
    """Refuse two runs whose configs differ in mathematics or whose data is not the same.

    Raises:
        ConfigError: names the key that differs, with both values.
    """
    difference = first_difference(first.config, second.config, first.data, second.data)
    if difference and difference[0] == DATA:
        raise ConfigError(
            f"the runs were trained on other data: {described(difference[1])} in {str(first.path)!r} and "
            f"{described(difference[2])} in {str(second.path)!r}; compare runs of one config on the same data"
        )
    if difference:
        key, here, there = difference
        raise ConfigError(
            f"the runs differ in mathematics: {key}={here!r} in {str(first.path)!r} and {there!r} in "
            f"{str(second.path)!r}; compare runs of one config"
        )
