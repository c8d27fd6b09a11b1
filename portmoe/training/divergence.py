"""Noticing that a run no longer learns: steps in a row that were skipped or whose loss is no number."""

import math

from portmoe.config import Config


class Divergence:
    """Counts bad steps in a row; the same on every rank, as the figures it is given are.

    A step is bad if its gradients were not finite, so that it was skipped, or if its loss is no number, as
    where no token of the global batch has a label. In float16 a step skipped with a loss counts from the
    smallest loss scale on: above it, skipping is how the scale is found.
    """

    def __init__(self, config: Config) -> None:
        self._limit = config.trainer.max_skipped_steps
        self._smallest = config.grad_scaler.fp16.min_scale if config.model.dtype == "float16" else math.inf
        self._row: list[int] = []  # the bad steps since the last good one
        self._loss_lost = False
        self._why = ""

    @property
    def sound(self) -> bool:
        """Whether the state after the last step is worth keeping: it made a loss, and no row of bad steps."""
        return not self._row and not self._loss_lost

    @property
    def reached(self) -> bool:
        """Whether the row is as long as ``trainer.max_skipped_steps``."""
        return self._limit is not None and len(self._row) >= self._limit

    def note(self, step: int, loss: float, labels: int, skipped: bool, scale: float) -> None:
        """Take note of one step.

        Args:
            labels: how many tokens had one.
            scale: the loss scale used in the step.
        """
        self._loss_lost = not math.isfinite(loss)
        if not self._loss_lost and (not skipped or scale > self._smallest):
            self._row = []
            return
        if not self._row:
            self._why = (
                "no token of the step has a label"
                if not labels
                else f"the loss is {loss}"
                if self._loss_lost
                else "its gradients are not finite"
            )
        self._row.append(step)

    def verdict(self) -> str | None:
        """What became of a run that ends now, where it ends in a row of bad steps."""
        if not self._row:
            return None
        first, count = self._row[0], len(self._row)
        steps = f"{count} steps in a row" if count > 1 else "its last step"
        return f"from step {first} on {steps} made no progress: {self._why}"
