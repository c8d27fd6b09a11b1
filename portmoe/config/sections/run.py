"""Where a run lives, what it saves and who watches it."""

from typing import Annotated, Literal

from pydantic import Field

from portmoe.config.keys import SAME_RUN, no_effect
from portmoe.config.section import Count, Path, Positive, Section


class RunConfig(Section):
    """Where a run lives and what makes it reproducible."""

    directory: Annotated[Path | None, SAME_RUN] = None  # null: runs/<run.name>, numbered
    # of letters, digits and "._-", what else is in it becomes "_"; null: the config's
    name: Annotated[Path | None, SAME_RUN] = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1024  # numpy's RandomState takes 32 bits
    # above 0: every weight begins one unit in its last place away, see ``training.twin``
    twin: Annotated[int, Field(ge=0, le=2**31)] = 0
    # seconds a collective may wait for a missing rank
    collective_timeout: Annotated[Positive, SAME_RUN] = 600


class LoadCheckpointConfig(Section):
    """Weights to start from, taken from a portmoe checkpoint folder."""

    path: Path | None = None
    content: list[Literal["model", "sampler", "optimizer", "scheduler", "all"]] = Field(["model"])
    ckpt_type: Literal["portmoe"] = "portmoe"


class CheckpointConfig(Section):
    """Saving and resuming."""

    enable_save_ckpt: bool = False
    save_ckpt_folder: Path | None = None  # null: <run directory>/checkpoints
    load_ckpt_folder: Annotated[str | None, no_effect("use ckpt.load_ckpt_info.path")] = None
    load_ckpt_info: LoadCheckpointConfig | None = None
    auto_resume: bool = True
    allow_changed_data: bool = False  # go on where the data is not what the run was trained on so far
    checkpoint_every: Positive = 50
    keep: Positive = 2  # only the newest `keep` checkpoints stay
    # completed steps after which the state is saved, whatever else is, and kept: for `portmoe replay`;
    # 0 is before the first step
    keep_steps: Annotated[list[Count], SAME_RUN] = Field([])
    # also save where a validation finds the lowest loss so far, and keep that until a lower one is saved
    keep_best: bool = False
    # steps after each of which hf_model-<step>/ is written; null: only hf_model/ at the end; 0: not even that
    export_every: Count | None = None
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None  # null: each tensor's own
    save_optimizer: bool = (
        True  # false: the weights alone, a third of the bytes; a run cannot go on from them
    )
    async_upload: bool = True  # write in the background while training goes on
    async_upload_tmp_folder: Annotated[
        str | None, no_effect("checkpoints are written in place, atomically")
    ] = None
    oss_snapshot_freq: Annotated[Count, no_effect("there is no object store to take snapshots to")] = 25

    @property
    def saves(self) -> bool:
        """Whether anything is saved at all."""
        return self.enable_save_ckpt or bool(self.keep_steps)


class EvalConfig(Section):
    """Prompts that the model is asked while it is trained, and answers greedily; they change no number."""

    prompts: list[Path] | Path = Field([])  # texts, or a file with one a line
    every: Positive = 25  # steps; also before the first and after the last
    max_tokens: Positive = 128  # of an answer


class LogConfig(Section):
    """What is shown while a run goes on. train.log has the benchmark's line of every step in any case."""

    terminal: Literal["table", "full"] = "table"  # full: the benchmark's lines there too
    every: Positive = 10  # steps between two rows where the output is no terminal


class AlertConfig(Section):
    """Alerts of the benchmark's own services, which are not sent."""

    enable_feishu_alert: Literal[False] = False
    feishu_alert_address: Annotated[str | None, no_effect("alerts are not sent")] = None
    light_monitor_address: Annotated[str | None, no_effect("heartbeats are not sent")] = None
    alert_file_path: Annotated[str | None, no_effect("alerts are not written")] = None


class TensorboardConfig(Section):
    """Event files for TensorBoard."""

    queue_max_length: Positive = 10


class MonitorConfig(Section):
    """Who watches the run."""

    alert: AlertConfig = AlertConfig()
    tensorboard: TensorboardConfig = TensorboardConfig()
