"""DeepSpeed's ZeRO as an alternative engine: it shards and reduces, the rest is portmoe's own.

The model's parameters stay float32, and its modules cast them where they compute, as they do without any
engine: so routers keep their precision in bfloat16, where DeepSpeed's own 16-bit modes would cast them, and
the mathematics is the native engine's. What that costs: whole weights and what is gathered take four bytes
each. DeepSpeed hands this rank's flat shard of weights and gradients to ``_Update``; the norms, the clipping,
the skipping of steps and AdamW itself are then the native engine's ``Optimizer``, on the pieces of the
parameters that lie in the shard.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from portmoe.config import Config
from portmoe.config.sections.execution import PARTITIONED_PARAMETERS
from portmoe.costs.parameters import parameter_groups
from portmoe.data.batch import Batch
from portmoe.errors import BackendError
from portmoe.model.decoder import Decoder, DecoderOutput
from portmoe.ops.table import OpTable
from portmoe.parallel.layout import Layout
from portmoe.training.deepspeed_experts import split_experts, whole_name
from portmoe.training.engine import Engine
from portmoe.training.optimizer import Optimizer, Update

if TYPE_CHECKING:
    from portmoe.parallel.pipeline import Consume


class DeepSpeedEngine(Engine):
    """ZeRO over the data-parallel ranks by DeepSpeed, in the stage ``trainer.deepspeed.zero_stage``.

    Args:
        ops: the chosen operations.
        world: a CPU process group of all ranks.
    """

    def __init__(
        self, config: Config, layout: Layout, ops: OpTable, device: torch.device, world: dist.ProcessGroup
    ) -> None:
        super().__init__(config, device, world)
        deepspeed = _imported(device)
        decoder = Decoder(config, ops).to(device)
        if config.expert_shard is not None:
            split_experts(decoder, config.expert_shard)
        self.model = nn.ModuleList([decoder])
        self._parameters = dict(decoder.named_parameters())
        self._shapes = {name: p.shape for name, p in self._parameters.items()}
        self._partitioned = config.trainer.deepspeed.zero_stage >= PARTITIONED_PARAMETERS
        update = _Update(self._parameters.values())
        settings = _settings(config, layout, sum(shape.numel() for shape in self._shapes.values()))
        self._gathered_parameters = deepspeed.zero.GatheredParameters
        self._zero, *_ = deepspeed.initialize(
            model=decoder, optimizer=update, config=settings, dist_init_required=False
        )
        if self._partitioned:
            # The decoder computes with the head's weight outside of the head's own forward.
            deepspeed.zero.register_external_parameter(decoder, decoder.head.weight)
        self._pieces = dict(self._cut())
        groups = {
            group: {name: nn.Parameter(self._pieces[name][1], requires_grad=False) for name in members}
            for group, members in parameter_groups(decoder).items()
        }
        layers = len(config.architecture.layers)
        self.optimizer = Optimizer(groups, ops.adamw, config.adam, world, layers, holders=1)
        update.apply = self._apply

    def _cut(self) -> Iterator[tuple[str, tuple[int, torch.Tensor]]]:
        """For each parameter where the piece held here begins in it, and the piece, a view of the shard."""
        parts = self._own_parts() if self._partitioned else self._parts_of_the_row()
        for (name, shape), (start, piece) in zip(self._shapes.items(), parts, strict=True):
            yield name, (start, piece[: shape.numel() - start])

    def _own_parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Stage 3 cuts every parameter into equal parts; the last ones may reach beyond it."""
        from deepspeed.utils import safe_get_local_fp32_param

        for name, parameter in self._parameters.items():
            part = safe_get_local_fp32_param(parameter)
            yield min(dist.get_rank() * part.numel(), self._shapes[name].numel()), part

    def _parts_of_the_row(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Stages 1 and 2 lay all parameters end to end and cut this row into equal shards."""
        ((shard,),) = (group["params"] for group in self._zero.optimizer.optimizer.param_groups)
        begin, end = (place * shard.numel() for place in (dist.get_rank(), dist.get_rank() + 1))
        offset = 0
        for shape in self._shapes.values():
            here = range(max(offset, begin), min(offset + shape.numel(), end))
            start = here.start - offset if here else 0
            yield (
                start,
                shard.detach()[here.start - begin : here.stop - begin] if here else shard.detach()[:0],
            )
            offset += shape.numel()

    def _accumulate(self, batches: Sequence[Batch], objective: "Consume") -> None:
        for number, batch in enumerate(batches):
            self._zero.set_gradient_accumulation_boundary(number == len(batches) - 1)
            result = objective(batch, self._forward(batch))
            self._backward_clock.start()
            self._zero.backward(result, scale_wrt_gas=False)
            self._backward_clock.stop()

    def _update(self, lr: float, beta2: float, loss_scale: float, measure: bool) -> Update:
        limit = self._config.hybrid_zero_optimizer.clip_grad_norm
        self._settings_of_step = {"lr": lr, "beta2": beta2, "loss_scale": loss_scale, "limit": limit}
        self._settings_of_step["measure"] = measure
        # Stays where stage 3, which looks itself, finds a gradient that is not finite and skips the step.
        self._made = Update(dict.fromkeys(self._shapes, float("nan")), {})
        self._zero.step()
        return self._made

    def _apply(self, shard: torch.Tensor) -> None:
        """What DeepSpeed calls once in a step, with the reduced gradients in ``shard.grad``."""
        for piece in self.optimizer.parameters.values():
            begin = piece.storage_offset() - shard.storage_offset()
            piece.grad = shard.grad[begin : begin + piece.numel()]
        self._made = self.optimizer.clipped_step(**self._settings_of_step)
        self.optimizer.clear_gradients()

    def _evaluate(self, batches: Sequence[Batch], measure: "Consume") -> None:
        with torch.no_grad():
            for batch in batches:
                measure(batch, self._forward(batch))

    def _forward(self, batch: Batch) -> DecoderOutput | torch.Tensor:
        return self._zero(batch.tokens_T, batch)

    def tensors(self, optimizer: bool = True) -> dict[str, torch.Tensor]:
        """Whole copies on the host, each on one rank, so that no rank holds all of them."""
        return {name: whole for name, whole in self._gathered(optimizer) if whole is not None}

    def _gathered(self, optimizer: bool) -> Iterator[tuple[str, torch.Tensor | None]]:
        for number, (key, parts) in enumerate(self._named_parts()):
            if not optimizer and not key.startswith("model."):
                continue
            owner = number % dist.get_world_size()
            wholes = [self._whole(name, piece, owner) for name, piece in parts]
            yield key, torch.cat(wholes) if dist.get_rank() == owner else None

    def _whole(self, name: str, piece: torch.Tensor, owner: int) -> torch.Tensor:
        """What all ranks' pieces of a parameter make, on the owner's host."""
        whole = torch.zeros(self._shapes[name].numel(), device=self._device)
        start = self._pieces[name][0]
        whole[start : start + piece.numel()] = piece
        dist.reduce(whole, dst=owner)
        return whole.view(self._shapes[name]).cpu()

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for number, (key, parts) in enumerate(self._named_parts()):
            present = torch.tensor(key in tensors, dtype=torch.uint8, device=self._device)
            owner = number % dist.get_world_size()
            dist.broadcast(present, src=owner)
            if not present:
                continue
            row = 0
            for name, piece in parts:
                whole = torch.zeros(self._shapes[name], device=self._device)
                if dist.get_rank() == owner:
                    whole.copy_(tensors[key][row : row + len(whole)])
                row += len(whole)
                dist.broadcast(whole, src=owner)
                start = self._pieces[name][0]
                piece.copy_(whole.flatten()[start : start + piece.numel()])
                if key.startswith("model."):
                    self._set_weight(self._parameters[name], whole)

    def _named_parts(self) -> Iterator[tuple[str, list[tuple[str, torch.Tensor]]]]:
        """(name in a checkpoint, parameters and their pieces) of everything a checkpoint holds.

        The parameters, one or of several runs of experts, make its tensor along the first dimension.
        """
        kinds = {"model": self.optimizer.parameters}
        kinds |= {
            "optimizer.exp_avg": self.optimizer.exp_avg,
            "optimizer.exp_avg_sq": self.optimizer.exp_avg_sq,
        }
        for kind, pieces in kinds.items():
            parts: dict[str, list[tuple[str, torch.Tensor]]] = {}
            for name, piece in pieces.items():
                parts.setdefault(f"{kind}.{whole_name(name)}", []).append((name, piece.detach()))
            yield from parts.items()

    @torch.no_grad()
    def _set_weight(self, parameter: nn.Parameter, whole: torch.Tensor) -> None:
        """Give the weight the model computes with its master's value."""
        with self._gathered_parameters([parameter], modifier_rank=0, enabled=self._partitioned):
            parameter.copy_(whole)

    def state(self) -> dict[str, Any]:
        return {"updates": self.optimizer.updates, "loss_scale": self.loss_scale.state_dict()}

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        self.optimizer.updates = state["updates"]


class _Update(torch.optim.Optimizer):
    """What DeepSpeed takes for an optimizer: it puts its shard in place of the parameters."""

    apply: Callable[[torch.Tensor], None] | None = None  # None: DeepSpeed tries ``step`` out when it starts

    def __init__(self, parameters: Any) -> None:
        super().__init__([{"params": list(parameters)}], {"lr": 0.0})

    def step(self, closure: None = None) -> None:
        if self.apply is not None:
            (shard,) = self.param_groups[0]["params"]
            self.apply(shard)


def _imported(device: torch.device) -> Any:
    """The package, set to ``device`` and to be quiet."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # asked for also where one process trains
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of its own calls
    try:
        import deepspeed
    except Exception as error:  # a broken one raises anything
        raise BackendError(
            f"trainer.engine='deepspeed': deepspeed cannot be imported: {type(error).__name__}: {error}; "
            "reinstall it, or set trainer.engine to 'native'"
        ) from error
    # Collectives of its own for inference, which it would compile for a minute at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _settings(config: Config, layout: Layout, parameters: int) -> dict[str, Any]:
    chosen = config.trainer.deepspeed
    sharding = {
        "stage": chosen.zero_stage,
        "sub_group_size": parameters,  # one shard, so that clipping sees all of it
        "memory_efficient_linear": False,  # it would replace torch's own for the whole process
        "allgather_bucket_size": chosen.allgather_bucket_size,
        "reduce_bucket_size": chosen.reduce_bucket_size,
        "overlap_comm": chosen.overlap_comm,
        "contiguous_gradients": chosen.contiguous_gradients,
    }
    if config.expert_shard is not None:  # a run is freed behind its use, and one at most fetched ahead
        width = max(
            3 * layer.width * config.architecture.hidden for layer in config.architecture.expert_layers
        )
        sharding |= {
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": config.expert_shard * width,
        }
    return {
        "train_micro_batch_size_per_gpu": layout.micro_bsz,
        "gradient_accumulation_steps": layout.micro_num,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "log_level": "error",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {key: value for key, value in sharding.items() if value is not None},
    }
