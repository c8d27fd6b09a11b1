"""A run's weights in the hub's format: the folder they come from, and the folders they go to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from portmoe.checkpoint.agreement import agree, on_first_rank
from portmoe.checkpoint.folder import complete_steps, folder_of
from portmoe.checkpoint.hub_export import export as stream
from portmoe.checkpoint.hub_files import DTYPES, HubFolder, read_folder, require
from portmoe.checkpoint.hub_layout import shapes
from portmoe.checkpoint.hub_read import fill
from portmoe.checkpoint.hub_write import Target, write
from portmoe.checkpoint.store import best_step
from portmoe.config import Config
from portmoe.config.pretrained import CONFIG, architecture_keys, completed, read_json, read_pretrained
from portmoe.config.read import load_config
from portmoe.costs.parameters import parameter_shapes
from portmoe.errors import ConfigError
from portmoe.families.architecture import Architecture
from portmoe.families.hub import Hub, Made
from portmoe.families.registry import families
from portmoe.files import json_text
from portmoe.model.precision import compute_dtype
from portmoe.record.run_directory import CONFIG as RUN_CONFIG
from portmoe.record.run_directory import checkpoints_of
from portmoe.training.beside import KEPT_DTYPES, keep, kept_files, token_ids
from portmoe.training.engine import Engine

BEST = "best"  # in place of a step
PREFIX = "model."  # of the parameters among an engine's tensors


def hub_of(config: Config) -> Hub:
    """The format on the hub of the config's family.

    Raises:
        ConfigError: it has none.
    """
    known = families()
    hub = known[config.model_type].hub
    if hub is None:
        names = ", ".join(name for name, family in known.items() if family.hub is not None)
        raise ConfigError(
            f"model_type={config.model_type!r} has no format on the hub; these have one: {names}"
        )
    return hub


def made_of(config: Config) -> Mapping[str, Made]:
    """Parameter → what it is made of on the hub; tens of thousands of tensors, listed once for each model.

    Raises:
        ConfigError: the family has no format there.
    """
    hub_of(config)
    return _made(config.model_type, config.architecture)


@lru_cache(maxsize=1)
def _made(model_type: str, architecture: Architecture) -> Mapping[str, Made]:
    return families()[model_type].hub.made(architecture)


@dataclass(frozen=True)
class Weights:
    """The folder of ``model.from_pretrained``, held to the config and to the modules."""

    folder: HubFolder
    made: Mapping[str, Made]

    @classmethod
    def of(cls, config: Config) -> "Weights":
        """Look at the folder: config.json, index and headers.

        Raises:
            ConfigError: the folder is broken, or of another model.
        """
        completed(config.model_dump())  # refuses a config.json that has become another
        found = read_pretrained(config.model.from_pretrained)
        parameters, made = parameter_shapes(config), made_of(config)
        folder = read_folder(found.folder)
        require(folder, shapes(made, parameters))
        return cls(folder, made)

    def load(self, engine: Engine, group: dist.ProcessGroup) -> None:
        """Give the engine's parameters their values. Collective.

        Raises:
            TrainingError: some rank could not read a file to its end.
        """
        tensors = _parameters(engine)
        agree(group, lambda: fill(tensors, self.made, self.folder))
        engine.take({PREFIX + name: tensor for name, tensor in tensors.items()})


def require_folder(config: Config, rank: int, broadcast: Callable[[Any], Any]) -> None:
    """Look at the folder of ``model.from_pretrained``, if any, before memory is taken for its model.

    Args:
        broadcast: takes any picklable object and returns rank 0's on every rank.

    Raises:
        ConfigError: it is broken or of another model.
    """
    if config.model.from_pretrained is None:
        return
    problem = None
    if rank == 0:
        try:
            Weights.of(config)
        except ConfigError as error:
            problem = error
    if problem := broadcast(problem):
        raise problem


def begin_at_folder(config: Config, run: Path, engine: Engine, group: dist.ProcessGroup) -> None:
    """Put the engine at the weights of ``model.from_pretrained``. Collective.

    Raises:
        ConfigError: the folder is broken or of another model; no weight was touched.
        TrainingError: a file could not be read to its end.
    """
    found: list[Weights] = []
    agree(group, lambda: found.append(Weights.of(config)))
    (weights,) = found
    on_first_rank(group, lambda: keep(config, run, weights.folder))
    weights.load(engine, group)


def target(config: Config, run: Path, final: Path, dtype: str | None = None) -> Target:
    """The folder ``final``, as the weights of the run in ``run`` go there.

    Args:
        dtype: of all tensors; None: ``ckpt.export_dtype``, else that of their source, else ``model.dtype``.

    Raises:
        ConfigError: the family has no format on the hub.
    """
    hub, beside = hub_of(config), dict(kept_files(run))
    tensors = shapes(made_of(config), parameter_shapes(config))
    asked = dtype or config.ckpt.export_dtype
    most = compute_dtype(config.model) if asked is None else getattr(torch, asked)
    others: dict[str, str] = {}
    if config.model.from_pretrained is None:
        content = _config_json(config, hub, most) | token_ids(run)
        beside[CONFIG] = json_text(content, indent=2) + "\n"
    else:
        source = read_json(beside.pop(KEPT_DTYPES))
        if asked is None:
            most, others = DTYPES[source["most"]], source["others"]
        else:
            beside[CONFIG] = _with_dtype(read_json(beside[CONFIG]), asked)
    dtypes = {name: DTYPES[others[name]] if name in others else most for name in tensors}
    return Target(final, tensors, dtypes, beside)


def export(config: Config, run: Path, final: Path, engine: Engine, group: dist.ProcessGroup) -> None:
    """Write the engine's weights to the folder ``final``. Collective.

    Raises:
        TrainingError: there is no room, or the disk fails; nothing is left of it then.
    """
    write(target(config, run, final), _parameters(engine), made_of(config), group)


def export_run(
    run: Path,
    step: int | str | None,
    out: Path,
    dtype: str | None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> int:
    """Write a checkpoint of the run in ``run`` to the folder ``out``, on this process alone.

    Args:
        step: "best": that of the lowest validation loss (``ckpt.keep_best``); None: the newest.
        progress: as ``checkpoint.hub_export.export`` takes it.

    Returns:
        The step.

    Raises:
        ConfigError: no such run or checkpoint, a family without a format on the hub, or ``out`` is in use.
        TrainingError: the checkpoint is damaged, or the folder cannot be written.
    """
    if not (run / RUN_CONFIG).is_file():
        raise ConfigError(f"{str(run)!r} is no run: it holds no {RUN_CONFIG}; give the directory of a run")
    config = load_config(run / RUN_CONFIG)
    made = made_of(config)
    checkpoints = checkpoints_of(run, config)
    chosen = step_of(checkpoints, step)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {str(out)!r} exists and is not empty; give another folder")
    checkpoint = folder_of(checkpoints, chosen)
    stream(checkpoint, target(config, run, out, dtype), parameter_shapes(config), made, progress)
    return chosen


def step_of(checkpoints: Path, step: int | str | None) -> int:
    """The step of a checkpoint in a run's folder of them: None: of the newest.

    Args:
        step: also ``BEST``.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    steps = complete_steps(checkpoints)
    if step == BEST and (step := best_step(checkpoints)) is None:
        raise ConfigError(f"{checkpoints} has no best one: train with ckpt.keep_best, or give --step N")
    if not steps or (step is not None and step not in steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        there = f"; there are {', '.join(map(str, steps))}" if steps else ""
        raise ConfigError(f"{checkpoints} holds {wanted}{there}")
    return steps[-1] if step is None else step


def _parameters(engine: Engine) -> dict[str, torch.Tensor]:
    tensors = engine.tensors(optimizer=False)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _config_json(config: Config, hub: Hub, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a model that did not come from a folder."""
    model = config.model.model_dump()
    keys = {key: _given(model[key]) for key in architecture_keys(families()[config.model_type])}
    named = str(dtype).removeprefix("torch.")
    return {
        "architectures": [hub.architecture],
        "model_type": config.model_type,
        **keys,
        "torch_dtype": named,
    }


def _given(value: Any) -> Any:
    """A section without what it leaves open."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _with_dtype(content: dict[str, Any], dtype: str) -> str:
    there = [key for key in ("dtype", "torch_dtype") if key in content] or ["torch_dtype"]
    return json_text(content | dict.fromkeys(there, dtype), indent=2) + "\n"
