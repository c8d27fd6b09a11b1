"""How the ranks share the work, which engine trains and which operations compute: no mathematics."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from portmoe.config.keys import no_effect
from portmoe.config.section import LARGEST, Positive, Section, Size


class Zero1Config(Section):
    """Which ranks shard optimizer state: size ≤ 0 all data-parallel ones, 1 none, n groups of n."""

    size: Annotated[int, Field(ge=-LARGEST, le=LARGEST)] = -1
    fsdp: bool = False


class TensorConfig(Section):
    """Ranks that share the tensors of a layer, and how: see ``parallel.layout``."""

    size: Size = 1
    mode: Literal["mtp", "msp", "fsp", "isp"] = "mtp"


class SequenceConfig(Section):
    """Ranks that split the tokens of a micro-batch: over heads as far as they go, beyond in a ring."""

    size: Size = 1


class PipelineConfig(Section):
    """Ranks that each hold some of the layers."""

    size: Size = 1
    interleaved_overlap: bool = False


class WeightConfig(Section):
    """Ranks a layer's weights are sharded over where tokens are split, gathered a layer at a time."""

    size: Size = 1
    overlap: bool = False
    memory_pool: bool = False


class ExpertConfig(Section):
    """Ranks the experts of a layer are spread over."""

    size: Size | None = None  # null: the most ranks that divide experts and data-parallel ranks evenly


class ParallelConfig(Section):
    """How the ranks share the work; ``parallel.layout`` derives the groups."""

    zero1: Zero1Config = Zero1Config()
    tensor: TensorConfig = TensorConfig()
    sequence: SequenceConfig = SequenceConfig()
    pipeline: PipelineConfig = PipelineConfig()
    weight: WeightConfig = WeightConfig()
    expert: ExpertConfig = ExpertConfig()

    @property
    def mode(self) -> str:
        """How the ranks that have the same micro-batch share it; splitting its tokens is ``isp``."""
        return "isp" if self.sequence.size > 1 else self.tensor.mode

    @property
    def shared_by(self) -> tuple[str, int]:
        """The ranks that have the same micro-batch and layers: the key, and how many."""
        if self.sequence.size > 1:
            return "parallel.sequence.size", self.sequence.size
        return "parallel.tensor.size", self.tensor.size

    @property
    def gathers_by_block(self) -> bool:
        """Whether parameters are sharded, and a block's are whole only while it computes."""
        return self.zero1.fsdp or self.weight.size > 1

    @model_validator(mode="after")
    def _weight_needs_isp(self) -> "ParallelConfig":
        if self.weight.size > 1 and self.mode != "isp":
            raise ValueError(
                f"parallel.weight.size={self.weight.size} acts only with parallel.tensor.mode='isp' or with "
                f"parallel.sequence.size, and parallel.tensor.mode={self.tensor.mode!r}; change one of these"
            )
        return self

    @model_validator(mode="after")
    def _tokens_or_layers(self) -> "ParallelConfig":
        if self.sequence.size > 1 and self.tensor.size > 1:
            raise ValueError(
                f"parallel.tensor.size={self.tensor.size} and parallel.sequence.size={self.sequence.size}: "
                "ranks share layers or split the tokens of a micro-batch, not both; set one of the two to 1"
            )
        return self


class OpsConfig(Section):
    """How implementations of the operations are chosen."""

    select: Literal["order", "measure"] = "order"
    fallback: Literal["allow", "warn", "error"] = "warn"
    disable: list[str] = Field([])  # implementations not to be chosen, as "attention.sdpa"


PARTITIONED_PARAMETERS = 3  # the stage of DeepSpeed from which parameters are sharded too


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Elements = Annotated[Positive, BeforeValidator(_whole)]


class DeepSpeedConfig(Section):
    """What DeepSpeed does; acts for ``trainer.engine: deepspeed`` only."""

    # 1: optimizer state sharded, 2: gradients too, 3: parameters too. (A Literal of 1 would take true.)
    zero_stage: Annotated[int, Field(ge=1, le=3)] = 1
    # elements, also as 3e8; null, here and below: DeepSpeed's own
    allgather_bucket_size: Elements | None = None
    reduce_bucket_size: Elements | None = None
    overlap_comm: bool | None = None
    contiguous_gradients: bool | None = None
    gather_16bit_weights_on_model_save: Annotated[
        bool, no_effect("every rank writes its part of a checkpoint and of hf_model (ckpt.export_dtype)")
    ] = False
    initial_scale_power: Annotated[int, Field(ge=0, le=127)] | None = (
        None  # of grad_scaler.fp16.initial_scale
    )


class TrainerConfig(Section):
    """Which engine shards the state and reduces the gradients."""

    engine: Literal["native", "deepspeed"] = "native"
    max_skipped_steps: Positive | None = 5  # so many bad steps in a row end the run; null: none do
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
