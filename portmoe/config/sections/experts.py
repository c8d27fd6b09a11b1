"""How tokens reach the experts."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from portmoe.config.keys import SAME_RUN, Key
from portmoe.config.section import LARGEST_SIZE, Experts, Factor, Section


class MoeConfig(Section):
    """The router and the expert buffers."""

    top_k: Experts = 2
    capacity_factor: Factor | None = 1.0  # null: dropless
    eval_capacity_factor: Factor | None = 1.0  # null: as in training
    min_capacity: Annotated[int, Field(ge=0, le=LARGEST_SIZE)] = 4
    noisy_gate_policy: Literal["Jitter", "RSample"] | None = None
    drop_tokens: bool = True
    use_rts: bool = True
    use_fused_gating: Annotated[bool, Key(asks_for=("topk_gating",))] = True
    enable_token_rearrange_opt: Annotated[bool, Key(same_run=True, asks_for=("dispatch", "combine"))] = True
    # which loss evens the load: the model's own, the benchmark's with loss.moe_loss_coeff, or none
    aux_loss: Literal["model", "gshard", "none"] = "model"
    use_tutel: Annotated[bool, Key(same_run=True, asks_for=("topk_gating",))] = False
    # shard: where parameters are sharded, so many experts are gathered, computed and freed at a time
    moe_implementation: Annotated[Literal["origin", "shard"], SAME_RUN] = "origin"
    expert_in_one_shard: Annotated[Experts | None, SAME_RUN] = None  # null: all that a rank holds

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
