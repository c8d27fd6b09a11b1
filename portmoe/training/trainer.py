"""The step loop: data in, steps, records and checkpoints out."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from signal import Signals
from typing import Any

from portmoe.checkpoint.folder import folder_of
from portmoe.config.sections.data import parse_step_ranges
from portmoe.errors import TrainingError
from portmoe.families.registry import families
from portmoe.profiling.profile import StepProfile
from portmoe.profiling.spans import WAITING, span
from portmoe.record.busy_cores import BusyCores
from portmoe.record.log_line import StepResult, StepTotals, step_record
from portmoe.record.throughput import Throughput
from portmoe.training import hub
from portmoe.training.divergence import Divergence
from portmoe.training.engine import StepOutcome
from portmoe.training.schedule import learning_rate
from portmoe.training.session import Session
from portmoe.training.validation import validate


@dataclass(frozen=True)
class Ending:
    """How the training of a run ended; the same on every rank.

    Attributes:
        complete: all steps are made.
        signal: what asked some rank to stop before that.
        diverged: why the run is worth nothing from some step on.
    """

    complete: bool
    signal: Signals | None = None
    diverged: str | None = None


class Trainer:
    """Runs the steps of one run on one rank.

    Args:
        profile: of some of the steps, where one is asked for.
    """

    def __init__(self, session: Session, profile: StepProfile | None = None) -> None:
        self.progress = session.progress
        self._session = session
        self._config = session.config
        self._balance = session.config.architecture.balance
        self._engine = session.engine
        self._accelerator = session.machine.accelerator
        self._layout = session.machine.layout
        self._profile = profile
        self._checkpointer = session.checkpointer if self._config.ckpt.saves else None
        self._passed_over = parse_step_ranges(self._config.data.skip_batches)
        # A run that goes on does so from a checkpoint of its own.
        self._saved_at = self.progress.step if session.run.resuming else None
        self._divergence = Divergence(self._config)
        self._cores = BusyCores() if self._accelerator.device.shared else None
        self._validated_to = self.progress.step  # the validations due before this step are made
        self._lowest: float | None = None  # that of a validation, where it is the lowest and not saved yet

    def fit(self, throughput: Throughput) -> Ending:
        """Train until ``data.total_steps``, until a rank is asked to stop, or until the run has diverged.

        The last thing done is a checkpoint, where checkpoints are enabled and the state is worth one.
        """
        ckpt, total, stop = self._config.ckpt, self._config.data.total_steps, 0
        if not self.progress.step:
            self._ask()
            if 0 in ckpt.keep_steps:
                self._save()
        while self.progress.step < total and not stop and not self._divergence.reached:
            if any(self.progress.step in passed for passed in self._passed_over):
                self.progress.step += 1
            else:
                stop = self._trained_step(throughput)
            step = self.progress.step
            if not stop:
                self._ask()
            due = ckpt.enable_save_ckpt and step % ckpt.checkpoint_every == 0
            if due or step in ckpt.keep_steps or self._lowest is not None:
                self._save()
            if ckpt.export_every and step % ckpt.export_every == 0 and step < total:
                self._export(f"hf_model-{step}")
        if not stop and (
            figures := self._validate(self.progress.step - 1)
        ):  # the last steps were passed over
            shown = " ".join(f"{name}={value:.6g}" for name, value in figures.items())
            self._session.writers.note(f"validation after step {self.progress.step - 1}: {shown}")
        if ckpt.enable_save_ckpt and self._divergence.sound:
            self._save()
        if self.progress.step >= total and ckpt.export_every != 0:
            self._export("hf_model")
        if self._checkpointer:
            self._checkpointer.wait()
            self._tell_problems()
        complete = self.progress.step >= total
        if complete or self._divergence.reached:
            return Ending(complete, diverged=self._divergence.verdict())
        return Ending(complete, Signals(stop))

    def _trained_step(self, throughput: Throughput) -> int:
        """One step with all that surrounds it; the signal that asked some rank to stop, or 0."""
        if self._profile:
            self._profile.before_step()
        step = self.progress.step
        stop = self.one_step(step, throughput, replayable=self._whole_at(step))
        if self._profile and (table := self._profile.after_step()):
            self._session.writers.note(table)
        return stop

    def _whole_at(self, step: int) -> bool:
        """Whether all that ``step`` begins with is in a checkpoint."""
        return self._saved_at == step and self._config.ckpt.save_optimizer

    def one_step(self, step: int, throughput: Throughput, replayable: bool) -> int:
        """One training step and its record; the signal that asked some rank to stop, or 0.

        Args:
            replayable: the state it begins in is saved, so record all that a replay of it is held to.
        """
        began = time.perf_counter()
        self._accelerator.memory.reset_peak()
        with span(WAITING):
            batches = self._session.train.batches(step)
        outcome = self._engine.train_step(step, batches, measure=replayable)
        with span(WAITING):
            stop = self._session.interrupt.received or 0
            totals = outcome.metrics.reduce(stop, self._session.world, self._layout)
            self._accelerator.device.synchronize()
        seconds = time.perf_counter() - began
        self.progress.step += 1
        self.progress.consumed_tokens += self._layout.tokens_per_step
        speed = throughput.update(self._layout.tokens_per_step, sum(totals.tokens), seconds)
        self._divergence.note(step, totals.loss, sum(totals.tokens), outcome.skipped, outcome.loss_scale)
        if self._checkpointer and self._divergence.sound:
            self._checkpointer.confirm()
        result = self._result(step, outcome, totals, seconds)
        if replayable:
            update = outcome.update
            result = replace(result, parameter_grad_norms=update.gradients, weight_changes=update.changes)
        self._session.writers.step(step_record(result, speed), self._validate(step))
        if self._cores and (busy := self._cores.look()):
            self._session.writers.note(busy)
        return totals.stop_signal

    def _result(self, step: int, outcome: StepOutcome, totals: StepTotals, seconds: float) -> StepResult:
        return StepResult(
            totals=totals,
            step=step,
            moe_loss=self._balance.coefficient * totals.aux_loss + self._balance.z * totals.z_loss,
            grad_norms=outcome.gradient_norms,
            layer_grad_norms=outcome.layer_gradient_norms,
            learning_rate=outcome.learning_rate,
            next_learning_rate=learning_rate(self._config, step + 1),
            beta2=outcome.beta2,
            loss_scale=outcome.loss_scale,
            skipped_steps=self._engine.loss_scale.skipped_steps,
            micro_num=self._layout.micro_num,
            consumed_tokens=self.progress.consumed_tokens,
            step_tokens=self._layout.tokens_per_step,
            step_seconds=seconds,
            forward_backward_seconds=outcome.forward_backward_seconds,
            backward_seconds=outcome.backward_seconds,
            peak_memory=self._accelerator.memory.peak(),
        )

    def _validate(self, step: int) -> Mapping[str, float] | None:
        """The figures of a validation after ``step``, where one is due or was due at a step passed over."""
        if self._session.valid is None:
            return None
        every = self._config.data.valid_every
        if not any((done + 1) % every == 0 for done in range(self._validated_to, step + 1)):
            return None
        self._validated_to = step + 1
        by_token = self._config.loss.reduction == "token"
        figures = validate(self._engine, self._session.valid, self._layout, self._session.world, by_token)
        loss, before = figures["valid_loss"], self.progress.best_loss
        if self._config.ckpt.keep_best and loss < (math.inf if before is None else before):
            self._lowest = loss
        return figures

    def _ask(self) -> None:
        """Put the prompts to the model where that is due: before a save, so that a run goes on behind it."""
        questions, step = self._session.questions, self.progress.step
        if questions is None or not questions.due(step, self._config.data.total_steps):
            return
        self._session.writers.answers(step, questions.ask(self._engine, self._session.world))

    def _save(self) -> None:
        """Save what is not saved yet, unless it is worth less than what is."""
        if not self._checkpointer or self._saved_at == self.progress.step:
            return
        if not self._divergence.sound:
            self._lowest = None
            self._session.writers.note(
                f"no checkpoint after step {self.progress.step - 1}, which was skipped or has no loss"
            )
            return
        best = self._lowest is not None
        if best:
            self.progress.best_step, self.progress.best_loss = self.progress.step, self._lowest
            self._lowest = None
        state: dict[str, Any] = {"progress": asdict(self.progress), "engine": self._engine.state()}
        state["data"] = self._session.data["train"]
        tensors = self._engine.tensors(optimizer=self._config.ckpt.save_optimizer)
        self._checkpointer.save(self.progress.step, tensors, state, best)
        self._saved_at = self.progress.step
        folder = folder_of(self._checkpointer.folder, self.progress.step)
        lowest = f", the lowest validation loss so far: {self.progress.best_loss:.6g}" if best else ""
        self._session.writers.note(f"checkpoint of {self.progress.step} steps: {folder}{lowest}")
        self._tell_problems()

    def _export(self, name: str) -> None:
        """Write the weights as the hub has them, where the family has a format there and they are sound.

        Where a checkpoint holds them too, what keeps them from being written does not end the run.
        """
        session, step = self._session, self.progress.step
        if families()[self._config.model_type].hub is None:
            return
        if not self._divergence.sound:
            session.writers.note(f"no {name} after step {step - 1}, which was skipped or has no loss")
            return
        try:
            hub.export(self._config, session.run.path, session.run.path / name, self._engine, session.world)
        except TrainingError as error:
            if self._saved_at != step:
                raise
            session.writers.note(f"WARNING: {error}; then `portmoe export {session.run.path} --step {step}`")

    def _tell_problems(self) -> None:
        for problem in self._session.checkpointer.problems():
            self._session.writers.note(f"WARNING: {problem}")
