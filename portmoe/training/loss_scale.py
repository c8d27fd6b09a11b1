"""The dynamic loss scale of float16 training, and the count of steps skipped in any dtype."""

from portmoe.config.sections.optimization import GradScalerConfig


class LossScale:
    """Scale of the loss, adapted to the gradients it produces.

    Rules, for float16:

    * a step with inf or nan gradients is skipped. It resets the run of clean steps and uses up one unit
      of ``hysteresis``; once all units are used, this and every later overflow multiply the scale by
      ``backoff_factor`` (not below ``min_scale``);
    * ``growth_interval`` clean steps in a row multiply the scale by ``growth_factor`` (not above
      ``max_scale``), restore the full hysteresis and start a new run.

    For other dtypes the scale is 1 and stays; skipped steps are counted all the same.
    """

    def __init__(self, config: GradScalerConfig, dtype: str) -> None:
        """``dtype``: as ``model.dtype`` has it."""
        self._config = config
        self._dynamic = dtype == "float16"
        self.scale = config.fp16.initial_scale if self._dynamic else 1.0
        self.skipped_steps = 0  # since the run began, resumptions included
        self._clean_steps = 0
        self._hysteresis = config.hysteresis

    def update(self, finite: bool) -> None:
        """Take note of one step. ``finite``: no rank's gradients had inf or nan; otherwise it was skipped."""
        if not finite:
            self.skipped_steps += 1
        if not self._dynamic:
            return
        if finite:
            self._clean_steps += 1
            if self._clean_steps == self._config.fp16.growth_interval:
                self.scale = min(self.scale * self._config.growth_factor, self._config.max_scale)
                self._clean_steps = 0
                self._hysteresis = self._config.hysteresis
        else:
            self._clean_steps = 0
            self._hysteresis = max(self._hysteresis - 1, 0)
            if self._hysteresis == 0:
                self.scale = max(self.scale * self._config.backoff_factor, self._config.fp16.min_scale)

    def state_dict(self) -> dict[str, float | int]:
        """Everything ``load_state_dict`` needs, as JSON can hold it."""
        state: dict[str, float | int] = {"skipped_steps": self.skipped_steps}
        if self._dynamic:
            state |= {
                "scale": self.scale,
                "clean_steps": self._clean_steps,
                "hysteresis": self._hysteresis,
            }
        return state

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Continue from ``state``. A scale is only taken over from float16 to float16."""
        self.skipped_steps = int(state["skipped_steps"])
        if self._dynamic and "scale" in state:
            self.scale = float(state["scale"])
            self._clean_steps = int(state["clean_steps"])
            self._hysteresis = int(state["hysteresis"])
