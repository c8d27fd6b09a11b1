"""Every key of a config in one tree of sections."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, SerializeAsAny, ValidationInfo, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from portmoe.config.keys import SAME_RUN, no_effect
from portmoe.config.section import ModelSection, Section
from portmoe.config.sections.data import DataConfig
from portmoe.config.sections.execution import PARTITIONED_PARAMETERS, OpsConfig, ParallelConfig, TrainerConfig
from portmoe.config.sections.experts import MoeConfig
from portmoe.config.sections.optimization import (
    AdamConfig,
    Beta2SchedulerConfig,
    GradScalerConfig,
    HybridZeroConfig,
    LossConfig,
    LrSchedulerConfig,
)
from portmoe.config.sections.run import CheckpointConfig, EvalConfig, LogConfig, MonitorConfig, RunConfig
from portmoe.families import registry
from portmoe.families.architecture import Architecture


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


class Tree(Section):
    """Every key of a config. Its sections are valid by themselves and may contradict each other.

    A family may have defaults of its own for keys outside its section.
    """

    JOB_NAME: Annotated[str, SAME_RUN] = "portmoe"
    model_type: Annotated[str, AfterValidator(_known_family), Field(json_schema_extra=_names_of_families)] = (
        registry.DEFAULT
    )
    run: RunConfig = RunConfig()
    ckpt: Annotated[CheckpointConfig, SAME_RUN] = CheckpointConfig()
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
    parallel: Annotated[ParallelConfig, SAME_RUN] = ParallelConfig()
    ops: Annotated[OpsConfig, SAME_RUN] = OpsConfig()
    trainer: Annotated[TrainerConfig, SAME_RUN] = TrainerConfig()
    # true: only deterministic kernels, on every backend
    cudnn_deterministic: Annotated[bool, SAME_RUN] = False
    cudnn_benchmark: Annotated[bool, no_effect("there are no convolutions to tune")] = False
    eval: Annotated[EvalConfig, SAME_RUN] = EvalConfig()
    log: Annotated[LogConfig, SAME_RUN] = LogConfig()
    monitor: Annotated[MonitorConfig, SAME_RUN] = MonitorConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_family(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("model_type", ""), str):
            return values
        family = registry.families().get(values.get("model_type", registry.DEFAULT))
        if family is None:
            return values
        filled = dict(values)
        for section, defaults in family.defaults.items():
            given = values.get(section, {})
            if isinstance(given, dict):
                filled[section] = dict(defaults) | given
        return filled

    @property
    def architecture(self) -> Architecture:
        """What the model is made of."""
        return registry.families()[self.model_type].architecture(self)

    @property
    def shards_parameters(self) -> bool:
        """Whether parameters are sharded, and whole only while they are computed with."""
        if self.trainer.engine == "deepspeed":
            return self.trainer.deepspeed.zero_stage >= PARTITIONED_PARAMETERS
        return self.parallel.gathers_by_block

    @property
    def expert_shard(self) -> int | None:
        """How many experts of a layer are gathered, computed and freed at a time; None: all at once."""
        sharded = self.moe.moe_implementation == "shard" and self.shards_parameters
        return self.moe.expert_in_one_shard if sharded else None

    @property
    def recomputed_layers(self) -> int:
        """How many of the layers, the first ones, recompute their activations in the backward pass."""
        return round(len(self.architecture.layers) * float(self.model.checkpoint))
