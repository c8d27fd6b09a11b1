"""The decoder: embedding, pre-norm blocks, final norm, head and loss."""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from portmoe.config import Config
from portmoe.families import architecture as arch
from portmoe.families.architecture import Architecture, Experts, Layer
from portmoe.model import balance
from portmoe.model.attention import Attention
from portmoe.model.feed_forward import FeedForward
from portmoe.model.init import initialise
from portmoe.model.latent_attention import LatentAttention
from portmoe.model.moe import MoE
from portmoe.model.noise import micro_batch_seed
from portmoe.model.norm import RMSNorm
from portmoe.model.precision import compute_dtype
from portmoe.model.recompute import recomputed
from portmoe.model.reference_table import reference_table
from portmoe.model.rotary import rotary_tables
from portmoe.model.share import Calls, Costs, Share
from portmoe.model.sharing import ALL_TOKENS
from portmoe.model.vocabulary import Embedding, Head
from portmoe.ops import OpTable, Segments

if TYPE_CHECKING:
    from portmoe.data.batch import Batch


class StageOutput(NamedTuple):
    """What a decoder without a head hands on. A tuple, so that module hooks find its tensors."""

    x_TH: torch.Tensor
    terms_W: torch.Tensor  # float32, sums over the layers so far, see ``model.balance``
    assigned_LE: torch.Tensor  # int64, assignments before drops; rows are this module's layers, in order
    kept_LE: torch.Tensor  # int64, assignments computed


class DecoderOutput(NamedTuple):
    """The result of one micro-batch."""

    loss_T: torch.Tensor  # float32, 0 where the label is −100
    correct_T: torch.Tensor  # bool
    aux_loss: torch.Tensor  # float32 scalar, of all layers, not yet multiplied by its coefficient
    z_loss: torch.Tensor  # float32 scalar, the same; 0 where its coefficient is
    assigned_LE: torch.Tensor
    kept_LE: torch.Tensor


class Block(nn.Module):
    """x + attention(norm(x)), then x + MoE(norm(x)), or a dense network in place of the MoE.

    Args:
        place: the layer's number in the decoder.
        recompute: keep only the input and compute the rest again in the backward pass. No generator state is
            saved for that: all noise is a function of the noise seed.
        offload: the input waits for that in host memory.
        where: the call sites of its operations; layers of one kind share them.
    """

    def __init__(
        self,
        model: Architecture,
        layer: Layer,
        place: int,
        ops: OpTable,
        recompute: bool = False,
        where: str = "",
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.hidden, model.norm_epsilon, model.exact_norms, ops, where)
        kind = LatentAttention if isinstance(layer.attention, arch.LatentAttention) else Attention
        self.attention = kind(model.hidden, layer.attention, model.exact_norms, ops, where)
        self.feed_forward_norm = RMSNorm(model.hidden, model.norm_epsilon, model.exact_norms, ops, where)
        self.is_moe = isinstance(layer.network, Experts)
        if self.is_moe:
            self.moe = MoE(model, layer.network, place, ops, where)
        else:
            self.feed_forward = FeedForward(model.hidden, layer.network.width, ops, where)
        self.counted_experts, self.terms = model.experts, balance.width(model)
        self.hidden = model.hidden
        self.recompute, self.offload = recompute, offload

    @property
    def network(self) -> "MoE | FeedForward":
        """What follows the attention."""
        return self.moe if self.is_moe else self.feed_forward

    def forward(
        self,
        x_TH: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        segments: Segments,
        noise_seed: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_TH, terms_W, assigned_E, kept_E), as in ``StageOutput``; the last three are 0 if dense."""
        if not (self.recompute and torch.is_grad_enabled()):
            return self._compute(x_TH, cos_TR, sin_TR, segments, noise_seed)
        compute = partial(
            self._compute, cos_TR=cos_TR, sin_TR=sin_TR, segments=segments, noise_seed=noise_seed
        )
        return recomputed(compute, x_TH, self.offload)

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
            none_E = torch.zeros(self.counted_experts, dtype=torch.int64, device=x_TH.device)
            none_W = x_TH.new_zeros(self.terms, dtype=torch.float32)
            return x_TH + self.feed_forward(h_TH), none_W, none_E, none_E
        y_TH, routing, terms_W = self.moe.compute(h_TH, noise_seed, segments)
        kept_E = routing.count_E.clamp(max=routing.capacity)  # an expert's slots fill from 0
        more = self.counted_experts - len(kept_E)  # another layer has more experts
        return x_TH + y_TH, terms_W, F.pad(routing.count_E, (0, more)), F.pad(kept_E, (0, more))

    def calls(self, share: Share) -> Calls:
        """Every operation a forward pass calls, with its site and its shapes."""
        yield from self.attention_norm.calls(share)
        yield from self.attention.calls(share)
        yield from self.feed_forward_norm.calls(share)
        yield from self.network.calls(share)

    def costs(self, share: Share) -> Costs:
        """What its parts cost in a micro-batch."""
        yield from self.attention_norm.costs(share)
        yield from self.attention.costs(share)
        yield from self.feed_forward_norm.costs(share)
        yield from self.network.costs(share)

    def kept_bytes(self, share: Share) -> int:
        """Bytes a lean implementation keeps of a micro-batch for the backward pass."""
        inputs = 2 * self.hidden * share.item * (share.own + share.entering)  # of both halves and their norms
        return inputs + self.attention.kept_bytes(share) + self.network.kept_bytes(share)


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
        model, again = config.architecture, config.recomputed_layers
        ops = ops or reference_table()
        places = sorted(range(len(model.layers)) if layers is None else layers)
        device = torch.get_default_device()
        with torch.device("meta"):  # values are drawn once, for the whole decoder, below
            self.embedding = Embedding(model.vocabulary, model.hidden) if embed else None
            self.layers = nn.ModuleDict()
            for place in places:
                layer = model.layers[place]
                where, offload = model.kind_name(layer), config.model.checkpoint_offload
                block = Block(model, layer, place, ops, place < again, where, offload)
                self.layers[str(place)] = block
            self.norm = RMSNorm(model.hidden, model.norm_epsilon, model.exact_norms, ops) if head else None
            self.head = Head(model.vocabulary, model.hidden, ops) if head else None
        self.architecture = model
        self.config = config
        self.tokens = ALL_TOKENS
        if device.type != "meta":
            self.to_empty(device=device)
            initialise(self, config)

    def forward(
        self, inputs: torch.Tensor, batch: "Batch", terms_so_far_W: torch.Tensor | None = None
    ) -> DecoderOutput | StageOutput | torch.Tensor:
        """One micro-batch.

        Args:
            inputs: ``batch.tokens_T`` (int64) where the embedding is here, else the x_TH of the stage before.
            batch: positions, segments, labels and the micro-batch's number.
            terms_so_far_W: float32, the terms of the stage before.

        Returns:
            ``DecoderOutput`` where the head is here, else ``StageOutput``. Where the batch asks for it, the
            head gives logits [B,V] instead, see ``Head.logits``.
        """
        x_TH = inputs if self.embedding is None else self._embed(inputs)
        tables = self._rotary_tables(self.tokens.attended(batch.positions_T))
        noise_seed = micro_batch_seed(self.config.run.seed, batch.index)
        terms_W = terms_so_far_W
        if terms_W is None:
            terms_W = x_TH.new_zeros(balance.width(self.architecture), dtype=torch.float32)
        assigned, kept = [], []
        for place, block in self.layers.items():
            cos_TR, sin_TR = tables[self.architecture.layers[int(place)].attention]
            x_TH, added_W, assigned_E, kept_E = block(x_TH, cos_TR, sin_TR, batch.segments, noise_seed)
            terms_W = terms_W + added_W
            assigned.append(assigned_E)
            kept.append(kept_E)
        assigned_LE, kept_LE = _stack(assigned, x_TH), _stack(kept, x_TH)
        if self.head is None:
            return StageOutput(x_TH, terms_W, assigned_LE, kept_LE)
        if batch.asked_B is not None:
            return self.head.logits(self.norm(x_TH), batch.asked_B)
        smoothing = self.config.loss.label_smoothing
        loss_T, correct_T = self.head(self.norm(x_TH), batch.labels_T, smoothing)
        aux_loss, z_loss = balance.losses(self.architecture, terms_W)
        return DecoderOutput(loss_T, correct_T, aux_loss, z_loss, assigned_LE, kept_LE)

    def _rotary_tables(
        self, positions_T: torch.Tensor
    ) -> dict[arch.Attention | arch.LatentAttention, tuple[torch.Tensor, torch.Tensor]]:
        """Cosine and sine for every kind of attention here; those of equal heads are made once."""
        made, tables = {}, {}
        for place in self.layers:
            sizes = self.architecture.layers[int(place)].attention
            key = (sizes.rotary, sizes.rotary_dim)
            if key not in made:
                made[key] = rotary_tables(positions_T, *key)
            tables[sizes] = made[key]
        return tables

    def _embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        x_TH = self.embedding(tokens_T).to(compute_dtype(self.config.model))
        scale = self.architecture.embedding_gradient
        if scale != 1.0:  # scales the gradient and leaves the value
            x_TH = scale * x_TH + (1.0 - scale) * x_TH.detach()
        return x_TH

    def costs(self, share: Share) -> Costs:
        """What the layers and the head cost in a micro-batch."""
        for block in self.layers.values():
            yield from block.costs(share)
        if self.head is not None:
            yield from self.norm.costs(share)
            yield from self.head.costs(share)


def _stack(rows: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """[L,E]; a stage may hold no layer at all."""
    return torch.stack(rows) if rows else torch.zeros((0, 0), dtype=torch.int64, device=like.device)
