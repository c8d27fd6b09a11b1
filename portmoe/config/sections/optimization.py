"""The loss, the optimizer, its schedules and the scaling of losses."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from portmoe.config.keys import SAME_RUN, no_effect
from portmoe.config.section import Above0, Count, Fraction, NonNegative, Positive, Section


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

    overlap_sync_grad: Annotated[
        bool, no_effect("the sharding engine overlaps gradient reduction itself")
    ] = False
    overlap_sync_param: Annotated[
        bool, no_effect("the sharding engine overlaps parameter gathering itself")
    ] = False
    reduce_bucket_size: Annotated[Positive, no_effect("one bucket is one decoder block")] = 512 * 1024 * 1024
    clip_grad_norm: NonNegative = 1.0  # 0: no clipping


class LossConfig(Section):
    """Terms of the training loss."""

    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    # what weighs alike in a step's loss: every labelled token, or every micro-batch, whatever it has of them
    reduction: Literal["token", "micro_batch"] = "micro_batch"
    moe_loss_coeff: NonNegative = 0.1
    z_loss_coeff: NonNegative = 0.0  # of the routers' z-loss


class AdamConfig(Section):
    """AdamW."""

    lr: NonNegative = 1e-4
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    adam_beta2_c: NonNegative = 0.0
    adam_eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.01


class LrSchedulerConfig(Section):
    """The learning rate: zero for init_steps, linear warm-up, then a cosine to eta_min."""

    total_steps: Annotated[Positive | None, SAME_RUN] = None  # null: data.total_steps
    init_steps: Count = 0
    warmup_ratio: Fraction = 0.01
    eta_min: NonNegative = 1e-5
    last_epoch: Literal[-1] = -1


class Beta2SchedulerConfig(Section):
    """beta2 = 1 − step^(−c) where c > 0, else constant."""

    init_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None  # null: adam.adam_beta2
    c: NonNegative | None = None  # null: adam.adam_beta2_c
    cur_iter: Literal[-1] = -1
