"""The typed config: the benchmark's sections and key names, plus the few keys portmoe adds.

Every section is strict: unknown keys and wrong types are refused. Reading files and turning
violations into messages is ``read``'s work; sizes that depend on the number of ranks are
``parallel.layout``'s. This module imports neither torch nor numpy, so that a config mistake is
reported at once.

A key marked ``no_effect`` exists because configs people already have contain it; setting it to
another value is accepted and reported at start as having no effect.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from portmoe.config.checks import contradictions
from portmoe.config.section import (
    LARGEST,
    LARGEST_SIZE,
    Above0,
    Count,
    Experts,
    Factor,
    Fraction,
    ModelSection,
    NonNegative,
    Path,
    Positive,
    Section,
    Size,
    no_effect,
)
from portmoe.families import registry
from portmoe.families.architecture import Architecture


class RunConfig(Section):
    """Where a run lives and what makes it reproducible."""

    directory: Path | None = None  # null: runs/<config name>, numbered
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1024  # numpy's RandomState takes 32 bits
    collective_timeout: Positive = 600  # seconds a collective may wait for a missing rank


class LoadCheckpointConfig(Section):
    """Weights to start from, taken from a portmoe checkpoint folder."""

    path: Path | None = None
    content: list[Literal["model", "sampler", "optimizer", "scheduler", "all"]] = Field(["model"])
    ckpt_type: Literal["portmoe"] = "portmoe"


class CheckpointConfig(Section):
    """Saving and resuming."""

    enable_save_ckpt: bool = False
    save_ckpt_folder: Path | None = None  # null: <run directory>/checkpoints
    load_ckpt_folder: str | None = no_effect(None, "use ckpt.load_ckpt_info.path")
    load_ckpt_info: LoadCheckpointConfig | None = None
    auto_resume: bool = True
    checkpoint_every: Positive = 50
    keep: Positive = 2  # only the newest `keep` checkpoints stay
    async_upload: bool = True  # write in the background while training goes on
    async_upload_tmp_folder: str | None = no_effect(None, "checkpoints are written in place, atomically")
    oss_snapshot_freq: Count = no_effect(25, "there is no object store to take snapshots to")


class DataConfig(Section):
    """What one step consumes. One micro-batch is one pack of micro_bsz · seq_len tokens."""

    seq_len: Size = 2048
    micro_num: Size = 1
    micro_bsz: Size = 1
    global_batch_size: Positive | None = None  # sequences; set: micro_num follows from it
    max_global_batch_size: Positive | None = None  # sequences; a larger global batch is refused
    valid_micro_num: Annotated[int, Field(ge=0, le=LARGEST_SIZE)] | None = None  # null: micro_num
    valid_every: Count = 0  # steps between validations, 0: none
    pack_sample_into_one: Literal[False] = False
    total_steps: Positive = 50
    skip_batches: str = ""  # steps passed over, as "3,10-12"
    rampup_batch_size: Literal[""] | None = ""
    min_length: Count = 50  # shorter samples of a tokenized data set are left out
    train_folder: Path | None = None  # null: the built-in dummy data
    valid_folder: Path | None = None
    num_samples: Size | None = None  # of the dummy data; null: 500 · data-parallel size
    fixed_random_dataset_seqlen: bool = True
    empty_cache_and_diag_interval: Count = no_effect(200, "memory is not emptied between steps")
    diag_outlier_ratio: NonNegative = no_effect(1.1, "slow ranks are not diagnosed")

    @field_validator("skip_batches")
    @classmethod
    def _skip_batches_parse(cls, text: str) -> str:
        parse_step_ranges(text)
        return text

    @model_validator(mode="after")
    def _batch_within_limit(self) -> "DataConfig":
        batch, limit = self.global_batch_size, self.max_global_batch_size
        if batch is not None and limit is not None and batch > limit:
            raise ValueError(
                f"data.global_batch_size={batch} is over data.max_global_batch_size={limit}; "
                f"set data.global_batch_size to {limit} or less"
            )
        return self

    def largest_token(self) -> int | None:
        """The largest token the dummy data can hold, whatever is drawn; None for data from a folder.

        A sample is its block length n, its number of blocks r, then the blocks. r starts below 200
        and doubles until n · r reaches seq_len, so n = 1 takes it furthest.
        """
        if self.train_folder is not None:
            return None
        blocks = range(10, 200)
        if not self.fixed_random_dataset_seqlen:
            return blocks[-1]
        return max(r << max(0, (-(-self.seq_len // r) - 1).bit_length()) for r in blocks)


class Fp16ScalerConfig(Section):
    """The fp16 part of the dynamic loss scaler."""

    initial_scale: Above0 = 2.0**16
    min_scale: Above0 = 1.0
    growth_interval: Positive = 1000


class GradScalerConfig(Section):
    """Dynamic loss scaling (acts for float16 only)."""

    fp16: Fp16ScalerConfig = Fp16ScalerConfig()
    growth_factor: Annotated[float, Field(gt=1, le=1024.0)] = 2.0
    backoff_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    max_scale: Above0 = 2.0**24
    hysteresis: Positive = 2

    @model_validator(mode="after")
    def _scales_ordered(self) -> "GradScalerConfig":
        if not self.fp16.min_scale <= self.fp16.initial_scale <= self.max_scale:
            raise ValueError(
                f"grad_scaler.fp16.min_scale={self.fp16.min_scale:g} ≤ grad_scaler.fp16.initial_scale="
                f"{self.fp16.initial_scale:g} ≤ grad_scaler.max_scale={self.max_scale:g} must hold; "
                "change one of the three"
            )
        return self


class HybridZeroConfig(Section):
    """Gradient clipping; the overlap switches belong to the engine, which decides them itself."""

    overlap_sync_grad: bool = no_effect(False, "the sharding engine overlaps gradient reduction itself")
    overlap_sync_param: bool = no_effect(False, "the sharding engine overlaps parameter gathering itself")
    reduce_bucket_size: Positive = no_effect(512 * 1024 * 1024, "one bucket is one decoder block")
    clip_grad_norm: NonNegative = 1.0  # 0: no clipping


class LossConfig(Section):
    """Terms of the training loss."""

    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    moe_loss_coeff: NonNegative = 0.1


class AdamConfig(Section):
    """AdamW."""

    lr: NonNegative = 1e-4
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    adam_beta2_c: NonNegative = 0.0
    adam_eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.01


class LrSchedulerConfig(Section):
    """Zero for init_steps, linear warm-up, then a cosine to eta_min."""

    total_steps: Positive | None = None  # null: data.total_steps
    init_steps: Count = 0
    warmup_ratio: Fraction = 0.01
    eta_min: NonNegative = 1e-5
    last_epoch: Literal[-1] = -1


class Beta2SchedulerConfig(Section):
    """beta2 = 1 − step^(−c) where c > 0, else constant."""

    init_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None  # null: adam.adam_beta2
    c: NonNegative | None = None  # null: adam.adam_beta2_c
    cur_iter: Literal[-1] = -1


class MoeConfig(Section):
    """The router and the expert buffers."""

    top_k: Experts = 2
    capacity_factor: Factor = 1.0
    eval_capacity_factor: Factor = 1.0
    min_capacity: Annotated[int, Field(ge=0, le=LARGEST_SIZE)] = 4
    noisy_gate_policy: Literal["Jitter", "RSample"] | None = None
    drop_tokens: bool = True
    use_rts: bool = True
    use_fused_gating: bool = True
    enable_token_rearrange_opt: bool = True
    use_tutel: bool = False

    @model_validator(mode="after")
    def _policy_fits(self) -> "MoeConfig":
        if self.noisy_gate_policy == "RSample" and self.use_fused_gating:
            raise ValueError(
                "moe.noisy_gate_policy='RSample' cannot be combined with moe.use_fused_gating=true; "
                "set moe.use_fused_gating to false or moe.noisy_gate_policy to null or 'Jitter'"
            )
        if self.noisy_gate_policy == "RSample" and self.top_k != 1:
            raise ValueError(
                f"moe.noisy_gate_policy='RSample' acts for moe.top_k=1 only, and moe.top_k={self.top_k}; "
                "set moe.noisy_gate_policy to null or 'Jitter'"
            )
        return self


class Zero1Config(Section):
    """size ≤ 0: optimizer state over the whole data-parallel group; 1: replicated; n: subsets of n."""

    size: Annotated[int, Field(ge=-LARGEST, le=LARGEST)] = -1
    fsdp: bool = False


class TensorConfig(Section):
    size: Size = 1
    mode: Literal["mtp", "msp", "fsp", "isp"] = "mtp"


class PipelineConfig(Section):
    size: Size = 1
    interleaved_overlap: bool = False


class WeightConfig(Section):
    size: Size = 1
    overlap: bool = False
    memory_pool: bool = False


class ExpertConfig(Section):
    size: Size | None = None  # null: the most ranks that divide experts and data-parallel ranks evenly


class ParallelConfig(Section):
    """How the ranks share the work; ``parallel.layout`` derives the groups."""

    zero1: Zero1Config = Zero1Config()
    tensor: TensorConfig = TensorConfig()
    pipeline: PipelineConfig = PipelineConfig()
    weight: WeightConfig = WeightConfig()
    expert: ExpertConfig = ExpertConfig()

    @property
    def gathers_by_block(self) -> bool:
        """Whether parameters are sharded, and a block's are whole only while it computes."""
        return self.zero1.fsdp or self.weight.size > 1

    @model_validator(mode="after")
    def _weight_needs_isp(self) -> "ParallelConfig":
        if self.weight.size > 1 and self.tensor.mode != "isp":
            raise ValueError(
                f"parallel.weight.size={self.weight.size} acts only with parallel.tensor.mode='isp', and "
                f"parallel.tensor.mode={self.tensor.mode!r}; change one of the two"
            )
        return self


class OpsConfig(Section):
    """How implementations of the operations are chosen."""

    select: Literal["order", "measure"] = "order"
    fallback: Literal["allow", "warn", "error"] = "warn"
    disable: list[str] = Field([])  # implementations not to be chosen, as "attention.sdpa"


class DeepSpeedConfig(Section):
    """Acts for ``trainer.engine: deepspeed`` only."""

    # 1: optimizer state sharded, 2: gradients too, 3: parameters too. (A Literal of 1 would take true.)
    zero_stage: Annotated[int, Field(ge=1, le=3)] = 1


class TrainerConfig(Section):
    engine: Literal["native", "deepspeed"] = "native"
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()


class AlertConfig(Section):
    enable_feishu_alert: Literal[False] = False
    feishu_alert_address: str | None = no_effect(None, "alerts are not sent")
    light_monitor_address: str | None = no_effect(None, "heartbeats are not sent")
    alert_file_path: str | None = no_effect(None, "alerts are not written")


class TensorboardConfig(Section):
    queue_max_length: Positive = 10


class MonitorConfig(Section):
    alert: AlertConfig = AlertConfig()
    tensorboard: TensorboardConfig = TensorboardConfig()


def _known_family(model_type: str) -> str:
    if model_type not in registry.families():
        raise PydanticCustomError("model_type", "no family")
    return model_type


def _names_of_families(schema: dict[str, Any]) -> None:
    names = list(registry.families())
    schema.update({"const": names[0]} if len(names) == 1 else {"enum": names})


def _section_of_family(value: Any, validate: Any, info: ValidationInfo) -> Any:
    """The ``model`` section as the family named by ``model_type`` has it."""
    family = registry.families().get(info.data.get("model_type"))
    if family is None:  # model_type is refused already, and the keys are unknown
        return ModelSection()
    return value if isinstance(value, family.section) else family.section.model_validate(value)


class Config(Section):
    """One training run, everything but the number of ranks and the backend."""

    JOB_NAME: str = "portmoe"
    model_type: Annotated[str, AfterValidator(_known_family), Field(json_schema_extra=_names_of_families)] = (
        registry.DEFAULT
    )
    run: RunConfig = RunConfig()
    ckpt: CheckpointConfig = CheckpointConfig()
    data: DataConfig = DataConfig()
    grad_scaler: GradScalerConfig = GradScalerConfig()
    hybrid_zero_optimizer: HybridZeroConfig = HybridZeroConfig()
    loss: LossConfig = LossConfig()
    adam: AdamConfig = AdamConfig()
    lr_scheduler: LrSchedulerConfig = LrSchedulerConfig()
    beta2_scheduler: Beta2SchedulerConfig = Beta2SchedulerConfig()
    use_fp32_norm: bool = False
    model: Annotated[SerializeAsAny[ModelSection], WrapValidator(_section_of_family)] = Field(
        {}, validate_default=True
    )
    moe: MoeConfig = MoeConfig()
    parallel: ParallelConfig = ParallelConfig()
    ops: OpsConfig = OpsConfig()
    trainer: TrainerConfig = TrainerConfig()
    cudnn_deterministic: bool = False  # true: only deterministic kernels, on every backend
    cudnn_benchmark: bool = no_effect(False, "there are no convolutions to tune")
    monitor: MonitorConfig = MonitorConfig()

    @property
    def architecture(self) -> Architecture:
        """What the model is made of."""
        return registry.families()[self.model_type].architecture(self)

    @property
    def recomputed_layers(self) -> int:
        """How many of the layers, the first ones, recompute their activations in the backward pass."""
        return round(len(self.architecture.layers) * float(self.model.checkpoint))

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        if problems := list(contradictions(self)):
            raise ValueError("\n".join(problems))
        return self


def parse_step_ranges(text: str) -> list[range]:
    """Read "3,10-12" as [range(3, 4), range(10, 13)]; a ValueError names the part that is no range."""
    ranges = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = part.partition("-")
        if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
            raise ValueError(f"{part!r} is neither a step nor a range of steps, as in '3,10-12'")
        ranges.append(range(int(first), int(last or first) + 1))
        if not ranges[-1]:
            raise ValueError(f"{part!r} ends before it begins; write the smaller step first")
    return ranges
