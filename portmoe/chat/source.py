"""Where a model to talk to is: a folder of the hub, or a run with its checkpoints and exports."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from portmoe.checkpoint import chunks
from portmoe.checkpoint.folder import complete_steps, folder_of
from portmoe.checkpoint.hub_read import fill
from portmoe.config import Config
from portmoe.config.pretrained import CONFIG, completed, read_json
from portmoe.config.read import load_config
from portmoe.errors import ConfigError
from portmoe.families.registry import families
from portmoe.generation.conversation import Conversation, open_conversation
from portmoe.record.run_directory import CONFIG as RUN_CONFIG
from portmoe.record.run_directory import checkpoints_of, is_finished
from portmoe.training.beside import KEPT
from portmoe.training.hub import Weights, step_of

EXPORT = "hf_model"
LONGEST = 4096  # tokens for which implementations are chosen; others do as well
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """A model's weights and tokenizer.

    Attributes:
        config: of one process that trains nothing, and of a gate that drops nothing.
        checkpoint: a folder of portmoe's; None: the weights are in the folder of the config.
        tokenizer: the folder of one; None: where the config says.
        said: in words, what this is.
    """

    config: Config
    checkpoint: Path | None
    tokenizer: Path | None
    said: str

    def load(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Fill plain ``parameters``, by name, in place.

        Raises:
            ConfigError: the weights are of another model.
            TrainingError: a file cannot be read.
        """
        if self.checkpoint is not None:
            chunks.fill(self.checkpoint, parameters)
            return
        weights = Weights.of(self.config)
        fill(parameters, weights.made, weights.folder)

    def conversation(self) -> Conversation:
        """The tokenizer and template.

        Raises:
            ConfigError: there is none.
            BackendError: a package that reads it is missing.
        """
        return open_conversation(self.config, self.tokenizer)


def find(given: Path, step: int | str | None = None) -> Source:
    """The model in ``given``, a run's directory or a folder of the hub.

    A run's newest weights are taken: ``hf_model`` where it is finished, else the newest checkpoint.

    Args:
        step: of a run's checkpoint, or "best"; None: the newest weights.

    Raises:
        ConfigError: there is no such model.
    """
    if (given / RUN_CONFIG).is_file():
        return _of_run(given, step)
    if not (given / CONFIG).is_file():
        raise ConfigError(
            f"{str(given)!r} is neither a run, which has a {RUN_CONFIG}, nor a folder of the hub, which has "
            f"a {CONFIG}; give one of the two"
        )
    if step is not None:
        raise ConfigError(
            f"--step {step} is for a run, and {str(given)!r} is a folder of the hub; leave it out"
        )
    return _of_folder(given)


def _of_folder(folder: Path) -> Source:
    content = read_json(folder / CONFIG)
    dtype = content.get("dtype") or content.get("torch_dtype")
    model = {"from_pretrained": str(folder), "dtype": dtype if dtype in DTYPES else "bfloat16"}
    config = _alone(completed({"model": model}))
    return Source(config, None, folder, f"{folder}, {config.model_type}")


def _of_run(run: Path, step: int | str | None) -> Source:
    config = load_config(run / RUN_CONFIG)
    checkpoints = checkpoints_of(run, config)
    steps = complete_steps(checkpoints)
    export = run / EXPORT
    if step is None and (export / CONFIG).is_file() and (is_finished(run) or not steps):
        return _of_folder(export)
    if not steps and not checkpoints.exists():
        raise ConfigError(
            f"{run} has neither an {EXPORT} nor a checkpoint; wait for one, or give another run"
        )
    chosen = step_of(checkpoints, step)
    kept = run / KEPT
    named = config.data.tokenizer or config.model.from_pretrained
    gone = named is None or not Path(named).exists()
    tokenizer = kept if gone and kept.is_dir() else None
    said = f"{run} after step {chosen}, {config.model_type}"
    return Source(_alone(config.model_dump()), folder_of(checkpoints, chosen), tokenizer, said)


def _alone(tree: Mapping[str, Any]) -> Config:
    """The config of the same model on one process, which only computes forward."""
    data = {
        key: value for key, value in tree.get("data", {}).items() if key in ("tokenizer", "chat_template")
    }
    model = dict(tree["model"]) | {"checkpoint": False, "num_chunks": 1}
    moe = dict(tree.get("moe", {})) | {"moe_implementation": "origin", "expert_in_one_shard": None}
    if families()[tree["model_type"]].hub is not None:
        moe["capacity_factor"] = None  # dropless
    kept = {key: tree[key] for key in ("use_fp32_norm",) if key in tree}
    data |= {"seq_len": LONGEST, "micro_bsz": 1, "micro_num": 1, "fixed_random_dataset_seqlen": False}
    return Config.model_validate(
        {"model_type": tree["model_type"], "model": model, "moe": moe, "data": data, **kept}
    )
