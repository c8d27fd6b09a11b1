"""The Mixture-of-Experts layer: router → dispatch → experts → combine."""

import torch
from torch import nn

from portmoe.config import Config
from portmoe.model.experts import Experts
from portmoe.model.feed_forward import FeedForward
from portmoe.model.init import initialise
from portmoe.model.linear import Linear
from portmoe.model.noise import layer_generator
from portmoe.model.reference_table import reference_table
from portmoe.model.router import Router
from portmoe.ops import OpTable, Routing


class MoELayer(nn.Module):
    """[T,H] → [T,H] for one micro-batch of T tokens, by the ``moe`` section and ``model.moe_type``.

    GShard and MegaBlock give every expert a buffer of ``capacity`` rows; MegaBlock-D computes every
    assignment in ragged groups. In evaluation ``eval_capacity_factor`` holds and neither Jitter nor
    RSample acts. With ``moe_use_residual`` the output is MoE(x)·c0 + MLP(x)·c1, c = softmax of a linear
    map hidden→2 (Rajbhandari et al. 2022, arXiv:2201.05596).

    Args:
        layer: the layer's number in the decoder; it enters initialisation and noise.
        ops: the chosen operations; None: the plain references.
    """

    def __init__(self, config: Config, layer: int = 0, ops: OpTable | None = None) -> None:
        super().__init__()
        ops = ops or reference_table()
        self.router = Router(config, ops)
        self.experts = Experts(config, ops)
        if config.model.moe_use_residual:
            self.residual = FeedForward(config, ops)
            self.coefficient = Linear(config.model.hidden_size, 2, ops)
        self.layer = layer
        self.config = config
        self.ops = ops
        initialise(self, config, prefix=f"layers.{layer}.moe.")

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The layer's output; noise, where the config asks for any, is the same in every call."""
        return self.compute(x_TH, self.config.run.seed)[0]

    def compute(self, x_TH: torch.Tensor, noise_seed: int) -> tuple[torch.Tensor, Routing]:
        """The layer's output and how its tokens were routed.

        Args:
            noise_seed: with the layer's number it determines all noise.
        """
        routing = self._route(x_TH, layer_generator(noise_seed, self.layer))
        y_TH = self.apply_experts(x_TH, routing)
        if self.config.model.moe_use_residual:
            c_T2 = self.coefficient(x_TH).float().softmax(-1).to(x_TH.dtype)
            y_TH = y_TH * c_T2[:, :1] + self.residual(x_TH) * c_T2[:, 1:]
        return y_TH, routing

    @property
    def _dropless(self) -> bool:
        return self.config.model.moe_type == "MegaBlock-D"

    def _route(self, x_TH: torch.Tensor, generator: torch.Generator) -> Routing:
        moe = self.config.moe
        factor = moe.capacity_factor if self.training else moe.eval_capacity_factor
        policy = moe.noisy_gate_policy if self.training else None
        logits_TE = self.router(x_TH, generator if policy == "Jitter" else None)
        if self.config.model.moe_type != "GShard":
            return self.ops.megablock_gating(
                logits_TE, moe.top_k, factor, drop_tokens=moe.drop_tokens, dropless=self._dropless
            )
        return self.ops.topk_gating(
            logits_TE,
            moe.top_k,
            factor,
            moe.min_capacity,
            drop_tokens=moe.drop_tokens,
            use_rts=moe.use_rts,
            noisy_gate_policy=policy,
            use_fused_gating=moe.use_fused_gating,
            generator=generator,
        )

    def apply_experts(self, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Each token's weighted sum of its experts' outputs, without the residual network."""
        return self.experts_ragged(x_TH, routing) if self._dropless else self._experts_static(x_TH, routing)

    def _experts_static(self, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        row_KT = routing.static_row_KS
        x_RH = self.ops.dispatch(x_TH, row_KT, routing.static_rows)
        y_ECH = self.experts(x_RH.unflatten(0, (routing.count_E.numel(), routing.capacity)))
        return self.ops.combine(y_ECH.flatten(0, 1), row_KT, routing.weight_KS)

    def experts_ragged(self, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        """``apply_experts`` with a row for every choice; those of dropped ones are zero and not used."""
        row_KT = routing.ragged_row_KS
        x_RH = self.ops.dispatch(x_TH, row_KT, routing.ragged_rows)
        y_RH = self.experts(x_RH, routing.ends_E)
        return self.ops.combine(y_RH, row_KT, routing.weight_KS)
