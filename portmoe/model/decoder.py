"""The decoder: embedding, pre-norm blocks, final norm, head and loss."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from portmoe.config import Config
from portmoe.model.attention import Attention
from portmoe.model.feed_forward import FeedForward
from portmoe.model.init import initialise
from portmoe.model.linear import Linear
from portmoe.model.moe import MoELayer
from portmoe.model.noise import micro_batch_seed
from portmoe.model.norm import RMSNorm
from portmoe.model.precision import compute_dtype, computed
from portmoe.model.reference_table import reference_table
from portmoe.model.rotary import rotary_tables
from portmoe.ops import OpTable, Segments

if TYPE_CHECKING:
    from portmoe.data.batch import Batch


class StageOutput(NamedTuple):
    """What a decoder without a head hands on. A tuple, so that module hooks find its tensors."""

    x_TH: torch.Tensor
    aux_loss: torch.Tensor  # float32 scalar, sum over the layers so far
    assigned_LE: torch.Tensor  # int64, assignments before drops; rows are this module's layers, in order
    kept_LE: torch.Tensor  # int64, assignments computed


class DecoderOutput(NamedTuple):
    """The result of one micro-batch."""

    loss_T: torch.Tensor  # float32, 0 where the label is −100
    correct_T: torch.Tensor  # bool
    aux_loss: torch.Tensor  # float32 scalar, sum over all layers, not yet multiplied by its coefficient
    assigned_LE: torch.Tensor
    kept_LE: torch.Tensor


class Block(nn.Module):
    """x + attention(norm(x)), then x + MoE(norm(x)), or a dense network in place of the MoE.

    A layer among the first ``model.checkpointed_layers`` keeps only its input and recomputes the rest in the
    backward pass. No generator state is saved for that: all noise is a function of the noise seed.
    """

    def __init__(self, config: Config, layer: int, ops: OpTable) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config, ops)
        self.attention = Attention(config, ops)
        self.feed_forward_norm = RMSNorm(config, ops)
        self.is_moe = config.model.is_moe_layer(layer)
        if self.is_moe:
            self.moe = MoELayer(config, layer, ops)
        else:
            self.feed_forward = FeedForward(config, ops)
        self.num_experts = config.model.num_experts
        self.recompute = layer < config.model.checkpointed_layers

    def forward(
        self,
        x_TH: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        segments: Segments,
        noise_seed: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_TH, aux_loss, assigned_E, kept_E), as in ``StageOutput``; the last three are 0 if dense."""
        arguments = (x_TH, cos_TR, sin_TR, segments, noise_seed)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._compute, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self._compute(*arguments)

    def _compute(
        self,
        x_TH: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        segments: Segments,
        noise_seed: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        x_TH = x_TH + self.attention(self.attention_norm(x_TH), cos_TR, sin_TR, segments)
        h_TH = self.feed_forward_norm(x_TH)
        if not self.is_moe:
            zeros_E = torch.zeros(self.num_experts, dtype=torch.int64, device=x_TH.device)
            return x_TH + self.feed_forward(h_TH), x_TH.new_zeros((), dtype=torch.float32), zeros_E, zeros_E
        y_TH, routing = self.moe.compute(h_TH, noise_seed)
        kept_E = routing.count_E.clamp(max=routing.capacity)  # an expert's slots fill from 0
        return x_TH + y_TH, routing.aux_loss, routing.count_E, kept_E


def _embedding(vocabulary: int, hidden: int) -> nn.Embedding:
    """An embedding that draws no values: on the meta device torch imports its compiler for that."""
    return nn.Embedding.from_pretrained(torch.empty(vocabulary, hidden), freeze=False)


class Decoder(nn.Module):
    """The whole model, or the part of it that one pipeline stage holds.

    Layers are keyed by their number in the whole model, so that a parameter has one name in every split.
    On a real device the parameters come initialised; built on the meta device they wait for
    ``model.init.initialise``. Parameters are float32 whatever ``model.dtype`` is (see ``model.precision``).

    Args:
        ops: the chosen operations; None: the plain references.
        layers: the layers held here; None: all.
        embed: whether the embedding is here (the first stage).
        head: whether the final norm, the head and the loss are here (the last stage).
    """

    def __init__(
        self,
        config: Config,
        ops: OpTable | None = None,
        layers: Iterable[int] | None = None,
        embed: bool = True,
        head: bool = True,
    ) -> None:
        super().__init__()
        model = config.model
        ops = ops or reference_table()
        layers = sorted(range(model.num_layers) if layers is None else layers)
        device = torch.get_default_device()
        with torch.device("meta"):  # values are drawn once, for the whole decoder, below
            self.embedding = _embedding(model.vocab_size, model.hidden_size) if embed else None
            self.layers = nn.ModuleDict({str(layer): Block(config, layer, ops) for layer in layers})
            self.norm = RMSNorm(config, ops) if head else None
            self.head = Linear(model.hidden_size, model.vocab_size, ops, bias=False) if head else None
        self.config = config
        self.ops = ops
        if device.type != "meta":
            self.to_empty(device=device)
            initialise(self, config)

    def forward(
        self, inputs: torch.Tensor, batch: "Batch", aux_so_far: torch.Tensor | None = None
    ) -> DecoderOutput | StageOutput:
        """One micro-batch.

        Args:
            inputs: ``batch.tokens_T`` (int64) where the embedding is here, else the x_TH of the stage before.
            batch: positions, segments, labels and the micro-batch's number.
            aux_so_far: float32 scalar, the aux_loss of the stage before.

        Returns:
            ``DecoderOutput`` where the head is here, else ``StageOutput``.
        """
        x_TH = inputs if self.embedding is None else self._embed(inputs)
        cos_TR, sin_TR = rotary_tables(batch.positions_T, self.config.model)
        noise_seed = micro_batch_seed(self.config.run.seed, batch.index)
        aux_loss = x_TH.new_zeros((), dtype=torch.float32) if aux_so_far is None else aux_so_far
        assigned, kept = [], []
        for block in self.layers.values():
            x_TH, aux, assigned_E, kept_E = block(x_TH, cos_TR, sin_TR, batch.segments, noise_seed)
            aux_loss = aux_loss + aux
            assigned.append(assigned_E)
            kept.append(kept_E)
        assigned_LE, kept_LE = _stack(assigned, x_TH), _stack(kept, x_TH)
        if self.head is None:
            return StageOutput(x_TH, aux_loss, assigned_LE, kept_LE)
        loss_T, correct_T = self.ops.cross_entropy(
            self.norm(x_TH),
            computed(self.head.weight, x_TH.dtype),
            batch.labels_T,
            self.config.loss.label_smoothing,
        )
        return DecoderOutput(loss_T, correct_T, aux_loss, assigned_LE, kept_LE)

    def _embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        x_TH = self.embedding(tokens_T).to(compute_dtype(self.config.model))
        scale = self.config.model.embed_grad_scale
        if scale != 1.0:  # scales the gradient and leaves the value
            x_TH = scale * x_TH + (1.0 - scale) * x_TH.detach()
        return x_TH


def _stack(rows: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """[L,E]; a stage may hold no layer at all."""
    return torch.stack(rows) if rows else torch.zeros((0, 0), dtype=torch.int64, device=like.device)
