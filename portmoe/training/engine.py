"""One optimizer step and evaluation: what every engine does alike, and the native engine."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from portmoe.accelerator.interface import BufferPool
from portmoe.config import Config
from portmoe.costs.parameters import merged, parameter_groups
from portmoe.data.batch import Batch
from portmoe.families.architecture import Balance
from portmoe.generation.decode import NextLogits, answering
from portmoe.model.decoder import DecoderOutput, StageOutput
from portmoe.model.init import initialise
from portmoe.ops.cross_entropy import IGNORED
from portmoe.ops.table import OpTable
from portmoe.parallel import tensor, zero
from portmoe.parallel.build import build
from portmoe.parallel.layout import Layout
from portmoe.parallel.mesh import Meshes
from portmoe.parallel.tensor import Region
from portmoe.profiling.spans import OPTIMIZER, span
from portmoe.profiling.stopwatch import Stopwatch
from portmoe.training.loss_scale import LossScale
from portmoe.training.metrics import StepMetrics
from portmoe.training.optimizer import Optimizer, Update, of_groups
from portmoe.training.reduction import weights
from portmoe.training.schedule import beta2, learning_rate

if TYPE_CHECKING:
    from portmoe.parallel.pipeline import Consume


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did, beside the metrics of its micro-batches."""

    metrics: StepMetrics
    gradient_norms: dict[str, float]  # group → L2 norm, unscaled, before clipping
    layer_gradient_norms: dict[str, list[float]]  # the same by place in the model, see ``optimizer.place``
    update: Update  # by parameter
    learning_rate: float
    beta2: float
    loss_scale: float  # as used in this step
    skipped: bool  # some rank's gradients were not finite
    forward_backward_seconds: float
    backward_seconds: float


class Engine(ABC):
    """One optimizer step and evaluation of a model, whoever shards it and reduces its gradients.

    A subclass builds the model and says how gradients come about and are applied.

    Attributes:
        model: this rank's decoders, one for each stage of a pipeline that it holds.
        optimizer: of the parameters, or parts of them, that this rank updates.
        loss_scale: of float16 training, and the count of skipped steps.

    Args:
        world: a CPU process group of all ranks.
    """

    model: nn.ModuleList
    optimizer: Optimizer

    def __init__(self, config: Config, device: torch.device, world: dist.ProcessGroup) -> None:
        self.loss_scale = LossScale(config.grad_scaler, config.model.dtype)
        self._config = self._schedule = config
        self._experts, self._balance = config.architecture.experts, config.architecture.balance
        self._device = device
        self._world = world
        self._backward_clock = Stopwatch(device)
        self._step_clock = Stopwatch(device)

    def train_step(self, step: int, batches: Sequence[Batch], measure: bool = False) -> StepOutcome:
        """Make one update from this rank's micro-batches; skip it where any rank's gradient is not finite.

        Args:
            measure: tell how far each parameter moved.
        """
        scale = self.loss_scale.scale
        counted = weights(self._config.loss, self._balance.over, batches, self._world)
        weight = {batch.index: of_batch for batch, of_batch in zip(batches, counted, strict=True)}
        batches = [batch.to(self._device, non_blocking=True) for batch in batches]
        metrics = StepMetrics(self._experts, batches)

        def objective(batch: Batch, output: DecoderOutput | StageOutput) -> torch.Tensor | None:
            loss, counts = mean_loss(output, batch), weight[batch.index]
            if loss is not None:
                loss = loss * counts.loss
                output = output._replace(
                    aux_loss=output.aux_loss * counts.balance, z_loss=output.z_loss * counts.z
                )
            metrics.add(batch, output, loss)
            if loss is None:
                return None
            return objective_of(loss, output, self._balance) * (scale / len(batches))

        self.model.train()
        self._step_clock.start()
        self._accumulate(batches, objective)
        self._step_clock.stop()
        lr, second_beta = learning_rate(self._schedule, step), beta2(self._schedule, step)
        with span(OPTIMIZER):
            update = self._update(lr, second_beta, scale, measure)
        layer_norms = self.optimizer.by_place(update.gradients)
        norms = of_groups(layer_norms)
        finite = all(map(math.isfinite, norms.values()))
        self.loss_scale.update(finite)
        return StepOutcome(
            metrics=metrics,
            gradient_norms=norms,
            layer_gradient_norms=layer_norms,
            update=update,
            learning_rate=lr,
            beta2=second_beta,
            loss_scale=scale,
            skipped=not finite,
            forward_backward_seconds=self._step_clock.seconds(),
            backward_seconds=self._backward_clock.seconds(),
        )

    def follow(self, schedule: Config) -> None:
        """Take learning rate and beta2 of the steps to come from another config."""
        self._schedule = schedule

    def evaluate(self, batches: Sequence[Batch]) -> StepMetrics:
        """The metrics of ``batches`` with evaluation's capacity and without noise; changes nothing."""
        batches = [batch.to(self._device, non_blocking=True) for batch in batches]
        metrics = StepMetrics(self._experts, batches)

        def measure(batch: Batch, output: DecoderOutput | StageOutput) -> torch.Tensor | None:
            loss = mean_loss(output, batch)
            metrics.add(batch, output, loss)
            return loss

        self.model.eval()
        self._evaluate(batches, measure)
        return metrics

    @contextmanager
    def answering(self) -> Iterator[NextLogits]:
        """What ``generate`` is given its logits by, on all ranks at once; nothing of training changes.

        A pipeline has no such pass.
        """
        with answering(self.model):
            yield lambda batch: self._forward(batch.to(self._device))
        zero.drop_compute_copies(self.model)

    def load_state(self, state: dict) -> None:
        """Continue from what ``state`` returned. The tensors have been taken over before."""
        self.loss_scale.load_state_dict(state["loss_scale"])

    @abstractmethod
    def _accumulate(self, batches: Sequence[Batch], objective: "Consume") -> None:
        """Run every micro-batch forward, its ``objective`` backward, and reduce the gradients' sum."""

    @abstractmethod
    def _update(self, lr: float, beta2: float, loss_scale: float, measure: bool) -> Update:
        """Clip, update where all gradients are finite, and forget them."""

    @abstractmethod
    def _evaluate(self, batches: Sequence[Batch], measure: "Consume") -> None:
        """Run every micro-batch forward and ``measure`` it."""

    @abstractmethod
    def _forward(self, batch: Batch) -> DecoderOutput | torch.Tensor:
        """Run one micro-batch forward where this rank holds the whole decoder."""

    @abstractmethod
    def tensors(self, optimizer: bool = True) -> dict[str, torch.Tensor]:
        """Everything a checkpoint holds as tensors, by name: plain tensors or DTensors. Collective.

        Args:
            optimizer: with its state; else the parameters alone.
        """

    @abstractmethod
    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from these of ``tensors()``, whose values have been read from a checkpoint. Collective."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything else a checkpoint holds, as JSON can hold it."""


class NativeEngine(Engine):
    """ZeRO-1 over the data-parallel ranks and a pipeline of stages, by PyTorch's own engines.

    ``model`` holds this rank's stages of the decoder, a single one without a pipeline.

    Args:
        ops: the chosen operations.
        world: a CPU process group of all ranks.
        pool: where buffers come from that are used again and again; None: one of the engine's own.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        ops: OpTable,
        meshes: Meshes,
        device: torch.device,
        world: dist.ProcessGroup,
        pool: BufferPool | None = None,
    ) -> None:
        super().__init__(config, device, world)
        self.model = build(config, ops, meshes, pool=pool)
        self.model.to_empty(device=device)
        if config.model.from_pretrained is None:  # else the folder, or a checkpoint, gives every value
            for decoder in self.model:
                initialise(decoder, config)
        groups = merged(map(parameter_groups, self.model))
        holders = layout.world // layout.pipeline
        layers, cut_moments = len(config.architecture.layers), layout.moments > 1
        self.optimizer = Optimizer(groups, ops.adamw, config.adam, world, layers, holders, cut_moments)
        self._region = Region.of_mode(meshes.tensor, config.parallel.mode)
        self._pipeline = None
        if layout.pipeline > 1:
            # Imported where needed: it takes about as long as the rest of torch.
            from portmoe.parallel.pipeline import Pipeline

            around_backward = (self._backward_clock.start, self._backward_clock.stop)
            self._pipeline = Pipeline(config, layout, meshes, self.model, device, around_backward)

    def _accumulate(self, batches: Sequence[Batch], objective: "Consume") -> None:
        if self._pipeline is None:
            self._accumulate_here(batches, objective)
        else:
            self._pipeline.train(batches, objective)
        tensor.sum_gradients(self.model, self._region)

    def _accumulate_here(self, batches: Sequence[Batch], objective: "Consume") -> None:
        (decoder,) = self.model
        for number, batch in enumerate(batches):
            zero.begin_micro_batch(decoder, last=number == len(batches) - 1)
            result = objective(batch, self._forward(batch))
            self._backward_clock.start()
            result.backward()
            self._backward_clock.stop()

    def _update(self, lr: float, beta2: float, loss_scale: float, measure: bool) -> Update:
        limit = self._config.hybrid_zero_optimizer.clip_grad_norm
        update = self.optimizer.clipped_step(
            lr=lr, beta2=beta2, loss_scale=loss_scale, limit=limit, measure=measure
        )
        self.optimizer.clear_gradients()
        return update

    def _evaluate(self, batches: Sequence[Batch], measure: "Consume") -> None:
        if self._pipeline is None:
            with torch.no_grad():
                for batch in batches:
                    measure(batch, self._forward(batch))
        else:
            self._pipeline.evaluate(batches, measure)
        zero.drop_compute_copies(self.model)

    def _forward(self, batch: Batch) -> DecoderOutput | torch.Tensor:
        (decoder,) = self.model
        return decoder(batch.tokens_T, batch)

    def tensors(self, optimizer: bool = True) -> dict[str, torch.Tensor]:
        model = {f"model.{name}": p.detach() for name, p in self.optimizer.parameters.items()}
        if not optimizer:
            return model
        return model | {f"optimizer.{name}": t for name, t in self.optimizer.tensors().items()}

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing is left to do: ``tensors`` gives the engine's own."""

    def state(self) -> dict[str, Any]:
        return {"updates": self.optimizer.updates, "loss_scale": self.loss_scale.state_dict()}

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        self.optimizer.updates = state["updates"]


def objective_of(loss: torch.Tensor, output: DecoderOutput, balance: Balance) -> torch.Tensor:
    """What a micro-batch is differentiated by: its mean loss and the auxiliary losses."""
    objective = loss + balance.coefficient * output.aux_loss
    return objective + balance.z * output.z_loss if balance.z else objective


def mean_loss(output: DecoderOutput | StageOutput, batch: Batch) -> torch.Tensor | None:
    """Mean over the micro-batch's labelled tokens; 0 where it has none, None where the head is elsewhere."""
    if isinstance(output, StageOutput):
        return None
    return output.loss_T.sum() / (batch.labels_T != IGNORED).sum().clamp(min=1)
