"""AdamW over the benchmark's parameter groups, with a gradient norm each and one clipping for all."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from portmoe.config.sections.optimization import AdamConfig
from portmoe.model.precision import local_tensor
from portmoe.parallel.zero import cut_further, gather_updates


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
        self._places = layers + 2
        places = [i * self._places + place(name, layers) for i, g in enumerate(groups.values()) for name in g]
        self._place_P = torch.tensor(places)
        self._replicas_P = torch.tensor([holders // _parts(p) for p in self.parameters.values()])

    def gradient_norms(self, loss_scale: float) -> dict[str, list[float]]:
        """L2 norm of the whole gradient by group and ``place``, the same on every rank.

        Each rank adds the squares it holds, divided by how many ranks hold the same part; the sum over
        all ranks is then right for every mixture of sharding and replication. One collective for all.
        """
        gradients = [local_tensor(p.grad) for p in self.parameters.values()]
        # First by row: one float32 sum over a whole matrix may add its numbers in turn, as a host does, and
        # beside the large ones of frequent tokens' rows small ones are lost (2.4e-5 of a head's norm).
        rows = [torch.linalg.vector_norm(gradient, dim=-1) for gradient in gradients]
        norms_P = torch.stack(torch._foreach_norm(rows)).cpu().double()
        squares = torch.zeros(len(self.groups) * self._places, dtype=torch.float64)
        squares.index_add_(0, self._place_P, norms_P.square() / self._replicas_P)
        dist.all_reduce(squares, group=self._world)
        by_group = (squares.sqrt() / loss_scale).view(len(self.groups), self._places)
        return dict(zip(self.groups, by_group.tolist(), strict=True))

    def clipped_step(
        self, *, lr: float, beta2: float, loss_scale: float, limit: float
    ) -> dict[str, list[float]]:
        """Make one update with the total norm clipped to ``limit``, and none where a gradient is not finite.

        Returns:
            The norms before clipping, as ``gradient_norms``.
        """
        norms = self.gradient_norms(loss_scale)
        by_group = of_groups(norms)
        if all(map(math.isfinite, by_group.values())):
            self.step(lr=lr, beta2=beta2, gradient_scale=clip_scale(by_group, limit) / loss_scale)
        return norms

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


def clip_scale(norms: Mapping[str, float], limit: float) -> float:
    """Factor that brings the total norm over all groups down to ``limit``; 1.0 if below, or if limit is 0."""
    total = math.sqrt(sum(norm * norm for norm in norms.values()))
    return limit / (total + 1e-6) if 0.0 < limit < total + 1e-6 else 1.0


def _parts(parameter: torch.Tensor) -> int:
    """Into how many parts ``parameter`` is cut, each on a rank of its own."""
    parts = 1
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for dimension, placement in enumerate(parameter.placements):
            parts *= 1 if placement.is_replicate() else mesh.size(dimension)
    return parts
