"""Sequence parallelism (tensor mode ``isp``): the ranks split a micro-batch's tokens and share no weights.

Everything that works token by token stays on a rank's own tokens. Three things look at more of them:

* attention: an all-to-all gives each rank some heads of all tokens, and another brings the results back
  (Jacobs et al. 2023, arXiv:2309.14509);
* routing: capacity, slots, drops and the auxiliary loss are those of the whole micro-batch, or the loss would
  depend on the layout. The router's logits, a few numbers per token, are gathered; every rank routes all
  tokens alike and computes the choices of its own;
* the loss: each token's is gathered, and every rank has the mean of all.

Each rank so differentiates the whole objective, and what was gathered sums the gradients of all ranks on its
way back: the mean over the ranks, which the sharding engine takes, is the gradient of one process.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from portmoe.model.attention import Attention
from portmoe.model.decoder import Decoder
from portmoe.model.moe import MoELayer
from portmoe.model.router import jitter_noise
from portmoe.ops import Routing
from portmoe.ops.gating import running_count
from portmoe.parallel.all_to_all import all_to_all
from portmoe.parallel.tensor import Region

Compute = Callable[..., torch.Tensor]


def split(model: Decoder, mesh: DeviceMesh) -> None:
    """Leave each rank of ``mesh`` an equal run of the tokens in every part of ``model``."""
    tokens = _Tokens(mesh)
    if model.embedding is not None:
        model.embedding.forward = partial(_embed, tokens, model.embedding.forward)
    for module in model.modules():
        if isinstance(module, Attention):
            module.qkv.forward = partial(_then_heads, tokens, module.qkv.forward)
            module.out.forward = partial(_first_tokens, tokens, module.out.forward)
        elif isinstance(module, MoELayer):
            module.router.forward = partial(_all_logits, tokens, module.router.forward)
            module.apply_experts = partial(_apply_experts, tokens, module)
    if model.head is not None:
        model.ops = copy.copy(model.ops)
        model.ops.cross_entropy = partial(_cross_entropy, tokens, model.ops.cross_entropy)


class _Tokens:
    """One rank's run of the tokens, and the ways to the other ranks' and back. T = ranks · t."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._region = Region(mesh, Shard(0))
        self._group = mesh.get_group()
        self._ranks = mesh.size()
        self._rank = mesh.get_local_rank()

    def own(self, whole: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's part [t, …] of what all ranks have of all tokens [T, …]."""
        return whole.chunk(self._ranks, dim)[self._rank]

    def whole_shape(self, own: torch.Tensor) -> tuple[int, ...]:
        return self._ranks * own.shape[0], *own.shape[1:]

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """[t, …] → [T, …]; the gradients of all ranks are summed on the way back."""
        return self._region.enter(own)

    def to_heads(self, x_tM: torch.Tensor) -> torch.Tensor:
        """Own tokens of all heads → all tokens of own heads, [t, ranks·m] → [T, m]."""
        return self._exchange(x_tM.unflatten(1, (self._ranks, -1)).transpose(0, 1)).flatten(0, 1)

    def to_tokens(self, y_Tm: torch.Tensor) -> torch.Tensor:
        """All tokens of own heads → own tokens of all heads, [T, m] → [t, ranks·m]."""
        return self._exchange(y_Tm.unflatten(0, (self._ranks, -1))).transpose(0, 1).flatten(1)

    def _exchange(self, x_Ptm: torch.Tensor) -> torch.Tensor:
        return all_to_all(x_Ptm, self._group)


def _embed(tokens: _Tokens, embed: Compute, tokens_T: torch.Tensor) -> torch.Tensor:
    return embed(tokens.own(tokens_T))


def _then_heads(tokens: _Tokens, project: Compute, x_tH: torch.Tensor) -> torch.Tensor:
    return tokens.to_heads(project(x_tH))


def _first_tokens(tokens: _Tokens, project: Compute, y_TM: torch.Tensor) -> torch.Tensor:
    return project(tokens.to_tokens(y_TM))


def _all_logits(
    tokens: _Tokens, route: Compute, x_tH: torch.Tensor, jitter: torch.Generator | None = None
) -> torch.Tensor:
    """The router's logits of all tokens."""
    if jitter is not None:
        noise_TH = jitter_noise(tokens.whole_shape(x_tH), jitter)
        x_tH = x_tH.float() * tokens.own(noise_TH).to(x_tH.device)
    return tokens.gather(route(x_tH)).clone()  # no view: a sharding engine hooks what a module returns


def _apply_experts(tokens: _Tokens, layer: MoELayer, x_tH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The experts' part for own tokens, of all tokens' routing.

    In the ragged buffer: a static one would have the whole micro-batch's rows on every rank.
    """
    expert_Kt = tokens.own(routing.expert_KS, dim=1)
    slot_A, count_E = running_count(expert_Kt.flatten(), routing.count_E.numel())
    capacity = expert_Kt.shape[1]  # a token chooses an expert once at most
    slot_Kt = slot_A.view_as(expert_Kt).where(tokens.own(routing.kept_KS, dim=1), capacity)
    weight_Kt = tokens.own(routing.weight_KS, dim=1)
    own = Routing(expert_Kt, slot_Kt, weight_Kt, capacity, routing.aux_loss, count_E)
    return layer.experts_ragged(x_tH, own)


def _cross_entropy(
    tokens: _Tokens,
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    x_tH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ops.cross_entropy`` of all tokens from own hidden states."""
    loss_t, correct_t = compute(x_tH, weight_VH, tokens.own(labels_T), label_smoothing)
    both_T2 = tokens.gather(torch.stack((loss_t, correct_t.float()), dim=1))
    return both_T2[:, 0].contiguous(), both_T2[:, 1].detach() > 0
