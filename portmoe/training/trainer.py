"""The step loop: data in, steps, records and checkpoints out."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from portmoe.accelerator import Accelerator
from portmoe.checkpoint.store import Checkpointer
from portmoe.config import Config, parse_step_ranges
from portmoe.data.loader import DataStream
from portmoe.launch.interrupt import Interrupt
from portmoe.parallel.layout import Layout
from portmoe.profiling.profile import StepProfile
from portmoe.profiling.spans import WAITING, span
from portmoe.record.log_line import StepResult, perplexity, step_record
from portmoe.record.throughput import Throughput
from portmoe.record.writers import Writers
from portmoe.training.engine import Engine, StepOutcome
from portmoe.training.metrics import StepTotals


@dataclass
class Progress:
    """Where a run is: what a checkpoint keeps beside the engine's own state."""

    step: int = 0  # completed steps, passed-over ones included
    consumed_tokens: int = 0
    global_batch: int = 0  # sequences per step: what places a step in the data


class Trainer:
    """Runs the steps of one run on one rank.

    Args:
        valid: None where ``data.valid_every`` is 0.
        checkpointer: None where nothing is saved.
        world: a CPU process group of all ranks.
        profile: of some of the steps, where one is asked for.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        accelerator: Accelerator,
        engine: Engine,
        train: DataStream,
        valid: DataStream | None,
        checkpointer: Checkpointer | None,
        progress: Progress,
        world: dist.ProcessGroup,
        profile: StepProfile | None = None,
    ) -> None:
        self.progress = progress
        self._config = config
        self._layout = layout
        self._accelerator = accelerator
        self._engine = engine
        self._train = train
        self._valid = valid
        self._checkpointer = checkpointer
        self._world = world
        self._profile = profile
        self._passed_over = parse_step_ranges(config.data.skip_batches)
        self._saved_at = progress.step if progress.step else None

    def fit(self, writers: Writers, throughput: Throughput, interrupt: Interrupt) -> bool:
        """Train until ``data.total_steps`` or until a rank is asked to stop; True if the run is complete.

        Either way the last thing done is a checkpoint, where checkpoints are enabled.
        """
        total = self._config.data.total_steps
        while self.progress.step < total:
            step = self.progress.step
            if any(step in passed for passed in self._passed_over):
                self.progress.step += 1
                continue
            if self._profile:
                self._profile.before_step()
            stop = self._one_step(step, writers, throughput, interrupt)
            if self._profile and (table := self._profile.after_step()):
                writers.note(table)
            if self._checkpointer and self.progress.step % self._config.ckpt.checkpoint_every == 0:
                self._save()
            if stop:
                break
        if self._checkpointer:
            if self._saved_at != self.progress.step:
                self._save()
            self._checkpointer.wait()
        return self.progress.step >= total

    def _one_step(self, step: int, writers: Writers, throughput: Throughput, interrupt: Interrupt) -> bool:
        """One training step and its record; True if some rank was asked to stop."""
        began = time.perf_counter()
        self._accelerator.memory.reset_peak()
        with span(WAITING):
            batches = self._train.batches(step)
        outcome = self._engine.train_step(step, batches)
        with span(WAITING):
            totals = outcome.metrics.reduce(interrupt.requested, self._world, self._layout)
            self._accelerator.device.synchronize()
        seconds = time.perf_counter() - began
        self.progress.step += 1
        self.progress.consumed_tokens += self._layout.tokens_per_step
        speed = throughput.update(self._layout.tokens_per_step, sum(totals.tokens), seconds)
        record = step_record(self._result(step, outcome, totals, seconds), speed)
        writers.step(record, self._validate(step))
        return totals.stop_requested

    def _result(self, step: int, outcome: StepOutcome, totals: StepTotals, seconds: float) -> StepResult:
        return StepResult(
            totals=totals,
            step=step,
            moe_loss=self._config.loss.moe_loss_coeff * totals.aux_loss,
            grad_norms=outcome.gradient_norms,
            layer_grad_norms=outcome.layer_gradient_norms,
            expert_parallel_size=self._layout.expert,
            learning_rate=outcome.learning_rate,
            beta2=outcome.beta2,
            loss_scale=outcome.loss_scale,
            skipped_steps=self._engine.loss_scale.skipped_steps,
            micro_num=self._layout.micro_num,
            consumed_tokens=self.progress.consumed_tokens,
            step_seconds=seconds,
            forward_backward_seconds=outcome.forward_backward_seconds,
            backward_seconds=outcome.backward_seconds,
            peak_memory=self._accelerator.memory.peak(),
        )

    def _validate(self, step: int) -> Mapping[str, float] | None:
        """The figures of a validation after ``step``, where one is due."""
        if self._valid is None or (step + 1) % self._config.data.valid_every:
            return None
        metrics = self._engine.evaluate(self._valid.batches(0))
        totals = metrics.reduce(False, self._world, self._layout)
        labels = max(sum(totals.tokens), 1)
        return {
            "valid_loss": totals.loss,
            "valid_acc": sum(totals.correct) / labels,
            "valid_perplexity": perplexity(sum(totals.loss_sums) / labels),
        }

    def _save(self) -> None:
        state: dict[str, Any] = {"progress": asdict(self.progress), "engine": self._engine.state()}
        self._checkpointer.save(self.progress.step, self._engine.tensors(), state)
        self._saved_at = self.progress.step
