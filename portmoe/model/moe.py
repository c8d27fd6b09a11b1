"""The Mixture-of-Experts network: router → dispatch → experts → combine."""

from typing import ClassVar

import torch
from torch import nn

from portmoe.config import Config
from portmoe.families import architecture as arch
from portmoe.model.balance import layer_terms
from portmoe.model.capacity import expert_capacity
from portmoe.model.experts import Experts
from portmoe.model.feed_forward import FeedForward
from portmoe.model.init import initialise
from portmoe.model.linear import Linear
from portmoe.model.noise import layer_generator
from portmoe.model.reference_table import reference_table
from portmoe.model.router import Router, jitter_noise
from portmoe.model.share import FP32_BYTES, INDEX_BYTES, Call, Calls, Costs, PartCost, Share, site
from portmoe.model.sharing import ALL_TOKENS, ALONE, INSIDE, Cut
from portmoe.ops import OpTable, Routing, Segments
from portmoe.ops.gating import running_count


class MoE(nn.Module):
    """[T,H] → [T,H] for one micro-batch of T tokens.

    A gate with a capacity gives every expert a buffer of that many rows; a dropless one computes every
    assignment in ragged groups. In evaluation ``eval_capacity_factor`` holds and there is no noise. What a
    shared network makes of every token is added; a residual one's output is mixed in by learned coefficients,
    experts(x)·c0 + residual(x)·c1, c = softmax of a linear map hidden→2 (Rajbhandari et al. 2022,
    arXiv:2201.05596).

    Args:
        layer: the layer's number in the decoder; it enters the noise.
    """

    cuts: ClassVar[dict[str, Cut]] = {
        "coefficient.weight": INSIDE,
        "coefficient.bias": INSIDE,
        "shared_gate.weight": INSIDE,
    }

    def __init__(
        self, model: arch.Architecture, sizes: arch.Experts, layer: int, ops: OpTable, where: str = ""
    ) -> None:
        super().__init__()
        hidden = model.hidden
        self.router = Router(sizes.count, hidden, ops.at(where))
        self.experts = Experts(sizes.count, hidden, sizes.width, ops.at(where), even=sizes.gate.drop_tokens)
        if sizes.shared is not None:
            self.shared = FeedForward(hidden, sizes.shared.width, ops, site(where, "shared"))
        if sizes.shared_gate:
            self.shared_gate = Linear(hidden, 1, ops, site(where, "shared gate"), bias=False)
        if sizes.residual is not None:
            self.residual = FeedForward(hidden, sizes.residual.width, ops, where)
            self.coefficient = Linear(hidden, 2, ops, site(where, "coefficient"))
        self.model, self.hidden, self.sizes, self.gate = model, hidden, sizes, sizes.gate
        self.layer = layer
        self.where = where
        self.ops = ops.at(where)
        self.region, self.tokens = ALONE, ALL_TOKENS

    def compute(
        self, x_TH: torch.Tensor, noise_seed: int, segments: Segments
    ) -> tuple[torch.Tensor, Routing, torch.Tensor]:
        """The layer's output, how the micro-batch's tokens were routed, and its terms of the loss [W].

        Args:
            noise_seed: with the layer's number it determines all noise.
            segments: of the micro-batch, over which the load may be balanced.
        """
        generator = layer_generator(noise_seed, self.layer)
        with self.region.entered(x_TH) as x_TH:
            if self.gate.jitter and self.training:
                noise_TH = jitter_noise(self.tokens.whole_shape(x_TH), generator, self.gate.jitter)
                x_TH = x_TH * self.tokens.own(noise_TH).to(x_TH)
            logits_TE = self._logits(x_TH, generator)
            routing = self._route(logits_TE, generator)
            terms_W = layer_terms(self.model, routing, logits_TE, segments)
            y_TH = self.apply_experts(x_TH, routing)
            if self.sizes.shared is not None:
                shared_TH = self.shared(x_TH)
                if self.sizes.shared_gate:
                    shared_TH = self.shared_gate(x_TH).sigmoid() * shared_TH
                y_TH = y_TH + shared_TH
            if self.sizes.residual is not None:
                c_T2 = self.coefficient(x_TH).float().softmax(-1).to(x_TH.dtype)
                y_TH = y_TH * c_T2[:, :1] + self.residual(x_TH) * c_T2[:, 1:]
        self.region.counted_once(terms_W)
        return self.region.leave(y_TH), routing, terms_W

    def _logits(self, x_TH: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The router's logits of the whole micro-batch."""
        jitter = self.training and self.gate.noise == "Jitter"
        return self.tokens.gather(self.router(x_TH, generator if jitter else None))

    def _route(self, logits_TE: torch.Tensor, generator: torch.Generator) -> Routing:
        gate = self.gate
        factor = gate.capacity_factor if self.training else gate.eval_capacity_factor
        if gate.kind == "softmax":
            return self.ops.softmax_gating(
                logits_TE,
                gate.top_k,
                normalise=gate.normalise,
                scale=gate.scale,
                groups=gate.groups,
                kept_groups=gate.kept_groups,
                capacity_factor=factor,
                min_capacity=gate.min_capacity,
            )
        if gate.kind == "megablock":
            return self.ops.megablock_gating(
                logits_TE, gate.top_k, factor, drop_tokens=gate.drop_tokens, dropless=gate.dropless
            )
        return self.ops.topk_gating(
            logits_TE,
            gate.top_k,
            factor,
            gate.min_capacity,
            drop_tokens=gate.drop_tokens,
            use_rts=gate.use_rts,
            noisy_gate_policy=gate.noise if self.training else None,
            use_fused_gating=gate.use_fused_gating,
            generator=generator,
        )

    def apply_experts(self, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Each token's weighted sum of its experts' outputs; ``routing`` is of the whole micro-batch."""
        if self.tokens.split:
            # In the ragged buffer: a static one would have the whole micro-batch's rows on every rank.
            return self._experts_ragged(x_TH, self._of_own_tokens(routing))
        if self.gate.dropless:
            return self._experts_ragged(x_TH, routing)
        return self._experts_static(x_TH, routing)

    def _of_own_tokens(self, routing: Routing) -> Routing:
        """The choices of this rank's tokens, which fill their experts anew; what is dropped stays so."""
        expert_Kt = self.tokens.own(routing.expert_KS, dim=1)
        slot_A, count_E = running_count(expert_Kt.flatten(), routing.count_E.numel())
        capacity = expert_Kt.shape[1]  # a token chooses an expert once at most
        slot_Kt = slot_A.view_as(expert_Kt).where(self.tokens.own(routing.kept_KS, dim=1), capacity)
        weight_Kt = self.tokens.own(routing.weight_KS, dim=1)
        return Routing(expert_Kt, slot_Kt, weight_Kt, capacity, routing.aux_loss, count_E)

    def _experts_static(self, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        row_KT = routing.static_row_KS
        x_RH = self.ops.dispatch(x_TH, row_KT, routing.static_rows)
        y_ECH = self.experts(x_RH.unflatten(0, (routing.count_E.numel(), routing.capacity)))
        return self.ops.combine(y_ECH.flatten(0, 1), row_KT, routing.weight_KS)

    def _experts_ragged(self, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Compute them with a row for every choice; those of dropped ones are zero and not used."""
        row_KT = routing.ragged_row_KS
        x_RH = self.ops.dispatch(x_TH, row_KT, routing.ragged_rows)
        y_RH = self.experts(x_RH, routing.ends_E)
        return self.ops.combine(y_RH, row_KT, routing.weight_KS)

    def _ragged(self, share: Share) -> bool:
        return self.gate.dropless or share.token_split

    def rows(self, share: Share) -> int:
        """Rows of the buffer all experts see together, for this rank's tokens."""
        if self._ragged(share):
            return self.gate.top_k * share.inside  # one for each choice
        return self.sizes.count * expert_capacity(self.sizes, share.tokens)

    def calls(self, share: Share) -> Calls:
        sizes, gate = self.sizes, self.gate
        chosen = {"experts": sizes.count, "top_k": gate.top_k}
        capacity = expert_capacity(sizes, share.tokens)
        work = share.workload(share.inside, hidden=self.hidden, experts=sizes.count)
        yield Call("router", self.where, work)
        work = share.workload(share.tokens, capacity=capacity, random_drops=gate.random_drops, **chosen)
        yield Call(f"{gate.kind}_gating", self.where, work)
        ragged = self._ragged(share)
        for operation in ("dispatch", "combine"):
            buffer = {"capacity": 0 if ragged else capacity, "dropless": gate.dropless}
            yield Call(
                operation, self.where, share.workload(share.inside, hidden=self.hidden, **chosen, **buffer)
            )
        # an expert sees the rows of all ranks that spread the experts among them
        held = sizes.count // share.expert_ranks
        at_once = share.expert_shard or held
        rows = {} if at_once == held else {"rows": -(-share.inside * gate.top_k * at_once // held)}
        work = share.workload(
            share.inside,
            hidden=self.hidden,
            ffn_width=sizes.width // share.parts,
            experts=at_once,
            top_k=gate.top_k,
            capacity=0 if ragged else capacity * share.expert_ranks,
            dropless=gate.dropless,
            **rows if ragged else {},
        )
        yield Call("expert_ffn_ragged" if ragged else "expert_ffn", self.where, work)
        for network in self._networks():
            yield from network.calls(share)
        if sizes.shared_gate:
            yield from self.shared_gate.call(share, share.inside)
        if sizes.residual is not None:
            yield from self.coefficient.call(share, share.inside)

    def costs(self, share: Share) -> Costs:
        tokens, hidden, item, sizes = share.inside, self.hidden, share.item, self.sizes
        rows = tokens * self.gate.top_k
        moved = 2 * (tokens + rows) * hidden * item  # a row read and written in either direction
        weights = 3 * sizes.count // share.expert_ranks * sizes.width // share.parts * hidden
        yield PartCost("router", 2 * tokens * hidden * sizes.count, 3 * tokens * hidden * item)
        yield PartCost("dispatch", 0, moved)
        products = 6 * rows * hidden * sizes.width / share.parts
        # weights twice and their gradient; rows, their result and both gradients
        yield PartCost("experts", products, (3 * weights + 4 * rows * hidden) * item)
        yield PartCost("combine", 0, moved + rows * hidden * item)  # its weights' gradient reads rows again
        for network in self._networks():
            yield from network.costs(share)
        if sizes.shared_gate:
            yield PartCost("dense network", 2 * tokens * hidden)
        if sizes.residual is not None:
            yield PartCost("dense network", 2 * tokens * 2 * hidden)

    def kept_bytes(self, share: Share) -> int:
        """Bytes of logits, probabilities, choices, the experts' buffer, and the networks beside them."""
        hidden, item, gate = self.hidden, share.item, self.gate
        routed = 2 * FP32_BYTES * self.sizes.count + gate.top_k * (4 * INDEX_BYTES + FP32_BYTES)
        inner = 3 * self.sizes.width * item // share.parts
        kept = share.inside * routed + self.rows(share) * (2 * hidden * item + inner)
        kept += sum(network.kept_bytes(share) for network in self._networks())
        if self.sizes.shared_gate:  # the output before its gate
            kept += share.inside * hidden * item
        if self.sizes.residual is not None:  # both outputs and their product with the coefficients
            kept += share.inside * 2 * hidden * item
        return kept

    def _networks(self) -> list[FeedForward]:
        """The networks every token passes."""
        return [module for module in self.children() if isinstance(module, FeedForward)]


class MoELayer(MoE):
    """One Mixture-of-Experts network by itself, as the first layer with experts of ``config`` has it.

    Args:
        layer: the layer's number in the decoder; it enters initialisation and noise.
        ops: the chosen operations; None: the plain references.
    """

    def __init__(self, config: Config, layer: int = 0, ops: OpTable | None = None) -> None:
        model = config.architecture
        super().__init__(model, model.expert_layers[0], layer, ops or reference_table())
        self.seed = config.run.seed
        initialise(self, config, prefix=f"layers.{layer}.moe.")

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The layer's output; noise, where the config asks for any, is the same in every call."""
        return self.compute(x_TH, self.seed, Segments((0, len(x_TH))))[0]
