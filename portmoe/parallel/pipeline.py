"""Pipeline parallelism by torch.distributed.pipelining: 1F1B, and interleaved 1F1B with ``model.num_chunks``.

Between the stages travel the hidden states and the running sums of the auxiliary losses' terms, and back
their gradients, so that the last stage's objective trains every router as it does without a pipeline. All
else a stage needs of a micro-batch it reads itself: the stages of one data-parallel rank load the same data,
and the schedule hands on no more than the micro-batch's number.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)

from portmoe.config import Config
from portmoe.data.batch import Batch
from portmoe.model import balance
from portmoe.model.decoder import Decoder, DecoderOutput, StageOutput
from portmoe.model.precision import compute_dtype
from portmoe.parallel import zero
from portmoe.parallel.layout import Layout
from portmoe.parallel.mesh import Meshes
from portmoe.parallel.stages import split_stages, stages_of

# Takes in a micro-batch's output. Of a ``DecoderOutput`` it returns the scalar to differentiate.
Consume = Callable[[Batch, DecoderOutput | StageOutput], torch.Tensor | None]


class Pipeline:
    """The stages this rank holds and the schedules that drive them.

    Args:
        decoders: this rank's parts of the model, one per stage, in the order of ``stages_of``.
        around_backward: called before and after the backward pass of each stage and micro-batch.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        meshes: Meshes,
        decoders: Sequence[Decoder],
        device: torch.device,
        around_backward: tuple[Callable[[], None], Callable[[], None]],
    ) -> None:
        # On a failure they print their whole order of operations; the error itself is raised all the same.
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
        self._config = config
        self._layout = layout
        self._group = meshes.pipeline.get_group()
        self._stages = stages_of(config, meshes.pipeline.get_local_rank())
        self._calls = [_StageCall(decoder) for decoder in decoders]
        self._device = device
        self._around_backward = around_backward
        self._training = self._schedule(layout.micro_num, training=True)

    def train(self, batches: Sequence[Batch], consume: Consume) -> None:
        """Forward and backward passes of all of this rank's micro-batches, reducing gradients in the last."""
        self._run(self._training, batches, consume)

    def evaluate(self, batches: Sequence[Batch], consume: Consume) -> None:
        """Forward passes only, for any number of micro-batches."""
        with torch.no_grad():
            self._run(self._schedule(len(batches), training=False), batches, consume)

    def _run(self, schedule: Any, batches: Sequence[Batch], consume: Consume) -> None:
        for call in self._calls:
            call.batches, call.consume = batches, consume
        numbers = torch.arange(len(batches))  # on the host: it only picks a batch
        try:
            schedule.step(number=numbers, target=numbers, return_outputs=False)
        except RuntimeError as error:
            raise error.__cause__ or error from None  # torch hides the cause in a text of all arguments
        finally:
            for call in self._calls:
                call.batches, call.consume = (), None

    def _schedule(self, micro_num: int, training: bool) -> Any:
        stages = [
            _TimedStage(
                call,
                stage.number,
                len(split_stages(self._config)),
                self._device,
                input_args=() if stage.embed else self._between_stages(),
                output_args=torch.empty((), device="meta") if stage.head else self._between_stages(),
                group=self._group,
            )
            for call, stage in zip(self._calls, self._stages, strict=True)
        ]
        for stage in stages:
            stage.around_backward = self._around_backward
        if len(stages) == 1:
            if not training:
                return ScheduleGPipe(stages[0], micro_num)
            return Schedule1F1B(stages[0], micro_num, loss_fn=_objective, scale_grads=False)
        if not training:
            return ScheduleLoopedBFS(stages, micro_num)
        return ScheduleInterleaved1F1B(
            stages,
            micro_num,
            loss_fn=_objective,
            scale_grads=False,
            defer_pp_recv=not self._config.parallel.pipeline.interleaved_overlap,
        )

    def _between_stages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The shapes and types of the hidden states and of the terms of the auxiliary losses."""
        shape = (
            self._layout.tokens_per_micro_batch // self._layout.sequence,
            self._config.architecture.hidden,
        )
        x_TH = torch.empty(shape, dtype=compute_dtype(self._config.model), device="meta", requires_grad=True)
        terms = balance.width(self._config.architecture)
        return x_TH, torch.empty(terms, dtype=torch.float32, device="meta", requires_grad=True)


class _StageCall(nn.Module):
    """A part of the decoder as the schedule calls it: tensors in, a plain tuple of tensors out."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.batches: Sequence[Batch] = ()
        self.consume: Consume | None = None

    def forward(self, *received: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch = self.batches[int(number)]
        x, terms_so_far_W = received or (batch.tokens_T, None)
        output = self.decoder(x, batch, terms_so_far_W)
        objective = self.consume(batch, output)
        return (output.x_TH, output.terms_W) if isinstance(output, StageOutput) else (objective,)


class _TimedStage(PipelineStage):
    """A stage that reduces its gradients in its last backward pass, and lets that pass be timed.

    Its module is no FSDP module itself, so the schedule leaves gathering and reducing to the decoder's own
    hooks: one all-gather and one reduce-scatter per parameter group and step, overlapped with computing.
    """

    around_backward: tuple[Callable[[], None], Callable[[], None]]

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: torch.Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        before, after = self.around_backward
        zero.begin_micro_batch(self.submod.decoder, last=last_backward)
        before()
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        after()


def _objective(output: tuple[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """What the last stage returned: it knows its labels, and the schedule's target is only a number."""
    return output[0]
