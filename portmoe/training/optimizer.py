"""AdamW over the benchmark's parameter groups, with a gradient norm each and one clipping for all."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from portmoe.config.sections.optimization import AdamConfig
from portmoe.model.precision import local_tensor
from portmoe.parallel.zero import cut_further, gather_updates


@dataclass(frozen=True)
class Update:
    """What one update did to the whole model, the same on every rank.

    Attributes:
        gradients: parameter → L2 norm of its gradient, unscaled and before clipping.
        changes: parameter → L2 norm of how far it moved; empty where that was not asked for or the step was
            skipped.
    """

    gradients: dict[str, float]
    changes: dict[str, float]


class Optimizer:
    """AdamW whose state is kept by parameter name, in float32, sharded as the parameters are, or further.

    Args:
        groups: group name → parameter name → parameter, as ``parameter_groups`` gives them.
        adamw: the chosen implementation of the operation.
        world: a CPU process group of all ranks, for the norms.
        layers: of the whole model, whichever of them are here.
        holders: how many ranks hold these parameters, whole or in part: those of one pipeline stage.
        cut_moments: shard the moments also over the ranks that hold the same shard of a parameter. Each then
            updates its part of the shard, and they exchange the parts.
    """

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, nn.Parameter]],
        adamw: Callable[..., None],
        config: AdamConfig,
        world: dist.ProcessGroup,
        layers: int,
        holders: int,
        cut_moments: bool = False,
    ) -> None:
        self.groups = groups
        self.parameters = {name: p for group in groups.values() for name, p in group.items()}
        self._cut_moments = cut_moments
        self.exp_avg = {name: torch.zeros_like(self._part(p)) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(self._part(p)) for name, p in self.parameters.items()}
        self.updates = 0  # updates really made: skipped steps do not count in the bias correction
        self._adamw = adamw
        self._config = config
        self._world = world
        self._layers = layers
        self._replicas_P = torch.tensor([holders // _parts(p) for p in self.parameters.values()])
        self.members = _of_all_ranks({group: list(members) for group, members in groups.items()}, world)
        names = [name for members in self.members.values() for name in members]
        number = {name: i for i, name in enumerate(names)}
        self._number_P = torch.tensor([number[name] for name in self.parameters])
        self._names = names

    def gradient_norms(self, loss_scale: float) -> dict[str, float]:
        """L2 norm of every parameter's whole gradient, the same on every rank."""
        norms = self._norms([local_tensor(p.grad) for p in self.parameters.values()])
        return {name: norm / loss_scale for name, norm in norms.items()}

    def by_place(self, norms: Mapping[str, float]) -> dict[str, list[float]]:
        """Group → norm by ``place``, from norms by parameter."""
        squares = {group: [0.0] * (self._layers + 2) for group in self.members}
        for group, members in self.members.items():
            for name in members:
                squares[group][place(name, self._layers)] += norms[name] ** 2
        return {group: list(map(math.sqrt, by_place)) for group, by_place in squares.items()}

    def clipped_step(
        self, *, lr: float, beta2: float, loss_scale: float, limit: float, measure: bool = False
    ) -> Update:
        """Make one update with the total norm clipped to ``limit``, and none where a gradient is not finite.

        Args:
            measure: tell how far each parameter moved. Takes a copy of this rank's parameters on the host.
        """
        norms = self.gradient_norms(loss_scale)
        total = math.sqrt(sum(norm * norm for norm in norms.values()))
        if not math.isfinite(total):
            return Update(norms, {})
        held = [local_tensor(p.detach()) for p in self.parameters.values()]
        former = [tensor.to("cpu", copy=True) for tensor in held] if measure else []
        self.step(lr=lr, beta2=beta2, gradient_scale=clip_scale(total, limit) / loss_scale)
        if not measure:
            return Update(norms, {})
        moved = (now - then.to(now.device) for now, then in zip(held, former, strict=True))
        return Update(norms, self._norms(moved))

    def _norms(self, parts: Iterable[torch.Tensor]) -> dict[str, float]:
        """L2 norms of tensors of which each rank has the part that it holds of each parameter. Collective.

        Each rank adds the squares it holds, divided by how many ranks hold the same part; the sum over
        all ranks is then right for every mixture of sharding and replication. One collective for all.
        """
        # First by row: one float32 sum over a whole matrix may add its numbers in turn, as a host does, and
        # beside the large ones of frequent tokens' rows small ones are lost (2.4e-5 of a head's norm).
        rows = [torch.linalg.vector_norm(part, dim=-1) for part in parts]
        norms_P = torch.stack(torch._foreach_norm(rows)).cpu().double()
        squares = torch.zeros(len(self._names), dtype=torch.float64)
        squares[self._number_P] = norms_P.square() / self._replicas_P
        dist.all_reduce(squares, group=self._world)
        return dict(zip(self._names, squares.sqrt().tolist(), strict=True))

    def step(self, *, lr: float, beta2: float, gradient_scale: float) -> None:
        """Make one update with gradients multiplied by ``gradient_scale`` (unscaling and clipping in one)."""
        gradients = [local_tensor(self._part(p, p.grad)) for p in self.parameters.values()]
        if gradient_scale != 1.0:
            torch._foreach_mul_(gradients, gradient_scale)
        self.updates += 1
        parts = [self._part(p) for p in self.parameters.values()]
        self._adamw(
            [local_tensor(part) for part in parts],
            gradients,
            [local_tensor(t) for t in self.exp_avg.values()],
            [local_tensor(t) for t in self.exp_avg_sq.values()],
            self.updates,
            lr=lr,
            beta1=self._config.adam_beta1,
            beta2=beta2,
            eps=self._config.adam_eps,
            weight_decay=self._config.weight_decay,
        )
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            if isinstance(part, DTensor) and part.placements != parameter.placements:
                gather_updates(parameter.detach(), part)

    def _part(self, parameter: nn.Parameter, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """What this rank updates of ``parameter``, or of a ``tensor`` that lies as it does."""
        tensor = parameter.detach() if tensor is None else tensor
        if not self._cut_moments or not isinstance(parameter, DTensor):
            return tensor
        return tensor.redistribute(placements=cut_further(parameter))

    def clear_gradients(self) -> None:
        """Forget the gradients, and with them their memory."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state for a checkpoint, by name; writing into these tensors restores it."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {f"{kind}.{name}": t for kind, by_name in moments.items() for name, t in by_name.items()}


def place(parameter: str, layers: int) -> int:
    """Where a parameter lies in the model: 0 the embedding, 1 … ``layers`` its layer, then norm and head."""
    first, _, rest = parameter.partition(".")
    if first == "layers":
        return int(rest.partition(".")[0]) + 1
    return 0 if first == "embedding" else layers + 1


def of_groups(layer_norms: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Group → norm, from the norms by place."""
    return {group: math.hypot(*by_place) for group, by_place in layer_norms.items()}


def clip_scale(total: float, limit: float) -> float:
    """Factor that brings a total norm down to ``limit``; 1.0 if below, or if limit is 0."""
    return limit / (total + 1e-6) if 0.0 < limit < total + 1e-6 else 1.0


def _of_all_ranks(groups: dict[str, list[str]], world: dist.ProcessGroup) -> dict[str, list[str]]:
    """The parameters of every group, whichever stage of a pipeline holds them. Collective."""
    ranks: list[dict[str, list[str]]] = [{}] * world.size()
    dist.all_gather_object(ranks, groups, group=world)

    def members(group: str) -> Iterable[str]:
        return dict.fromkeys(name for held in ranks for name in held[group])

    return {group: list(members(group)) for group in groups}


def _parts(parameter: torch.Tensor) -> int:
    """Into how many parts ``parameter`` is cut, each on a rank of its own."""
    parts = 1
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for dimension, placement in enumerate(parameter.placements):
            parts *= 1 if placement.is_replicate() else mesh.size(dimension)
    return parts
