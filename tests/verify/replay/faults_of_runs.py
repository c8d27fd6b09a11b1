"""Whole runs gone wrong in one way each, as trainers go wrong, and what a replay must say differs first.

Each is planted in the process that trains. Those of a resumption act in the run's second start only.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

from portmoe.data.loader import DataStream
from portmoe.model.precision import local_tensor
from portmoe.training import engine, optimizer, session
from portmoe.training.engine import NativeEngine
from portmoe.training.optimizer import Optimizer
from portmoe.training.trainer import Trainer

RESUMED_AT = 5


@dataclass(frozen=True)
class Fault:
    """One way to go wrong.

    Attributes:
        planted: a context in which training does so.
        first: the quantity that differs first.
        ranks: that train.
        resumed: it acts after a resumption.
    """

    planted: Callable[[], AbstractContextManager]
    first: str
    ranks: int = 1
    resumed: bool = False


def the_schedule_starts_anew():
    right = engine.learning_rate
    return patch.object(engine, "learning_rate", lambda config, step: right(config, step - RESUMED_AT))


def the_data_is_one_step_on():
    right = DataStream.batches
    return patch.object(DataStream, "batches", lambda self, step: right(self, step + 1))


def the_moments_are_lost():
    right = NativeEngine.load_state

    def load(self, state):
        right(self, state)
        for moments in (self.optimizer.exp_avg, self.optimizer.exp_avg_sq):
            for tensor in moments.values():
                tensor.zero_()

    return patch.object(NativeEngine, "load_state", load)


def the_count_of_updates_is_lost():
    right = NativeEngine.load_state
    return patch.object(NativeEngine, "load_state", lambda self, state: right(self, state | {"updates": 0}))


def nothing_is_clipped():
    return patch.object(optimizer, "clip_scale", lambda total, limit: 1.0)


def the_auxiliary_loss_counts_once_a_rank():
    right = NativeEngine.__init__

    def build(self, config, layout, *rest):
        right(self, config, layout, *rest)
        self._balance = replace(self._balance, coefficient=self._balance.coefficient * layout.data)

    return patch.object(NativeEngine, "__init__", build)


def a_rank_trains_on_anothers_data():
    right = session.open_data
    return patch.object(session, "open_data", lambda config, **where: right(config, **where | {"rank": 0}))


@contextmanager
def the_weights_are_stale_after_a_save():
    """A save that swaps buffers and forgets to swap them back."""
    step, save = NativeEngine.train_step, Trainer._save

    def train_step(self, *rest, **more):
        self.former = {
            name: local_tensor(p).detach().clone() for name, p in self.optimizer.parameters.items()
        }
        return step(self, *rest, **more)

    def saving(self):
        before = self._saved_at
        save(self)
        if self._saved_at != before and hasattr(self._engine, "former"):
            self._checkpointer.wait()
            for name, parameter in self._engine.optimizer.parameters.items():
                local_tensor(parameter.detach()).copy_(self._engine.former[name])

    with patch.object(NativeEngine, "train_step", train_step), patch.object(Trainer, "_save", saving):
        yield


def the_last_micro_batch_is_dropped():
    right = NativeEngine._accumulate
    return patch.object(
        NativeEngine, "_accumulate", lambda self, batches, objective: right(self, batches[:-1], objective)
    )


def gradients_stay_from_step_to_step():
    return patch.object(Optimizer, "clear_gradients", lambda self: None)


def the_gradients_of_experts_are_divided_twice():
    right = NativeEngine._accumulate

    def accumulate(self, batches, objective):
        right(self, batches, objective)
        for name in self.optimizer.members["experts"]:
            local_tensor(self.optimizer.parameters[name].grad).div_(2)

    return patch.object(NativeEngine, "_accumulate", accumulate)


def no_weight_decays():
    right = Optimizer.__init__

    def build(self, groups, adamw, config, *rest, **more):
        right(self, groups, adamw, config.model_copy(update={"weight_decay": 0.0}), *rest, **more)

    return patch.object(Optimizer, "__init__", build)


def beta2_is_not_what_it_says():
    right = Optimizer.step
    return patch.object(Optimizer, "step", lambda self, **given: right(self, **given | {"beta2": 0.9}))


@contextmanager
def a_layer_is_never_updated():
    right = Optimizer.step

    def step(self, **given):
        frozen = [p for name, p in self.parameters.items() if name.startswith("layers.1.")]
        former = [local_tensor(p.detach()).clone() for p in frozen]
        right(self, **given)
        for parameter, then in zip(frozen, former, strict=True):
            local_tensor(parameter.detach()).copy_(then)

    with patch.object(Optimizer, "step", step):
        yield


UPDATE = "change of the weights"
FAULTS = {
    "the schedule starts anew": Fault(the_schedule_starts_anew, "learning rate", resumed=True),
    "the data is one step on": Fault(the_data_is_one_step_on, "data", resumed=True),
    "the moments are lost": Fault(the_moments_are_lost, UPDATE, resumed=True),
    "the count of updates is lost": Fault(the_count_of_updates_is_lost, UPDATE, resumed=True),
    "nothing is clipped": Fault(nothing_is_clipped, UPDATE),
    "the auxiliary loss counts once a rank": Fault(
        the_auxiliary_loss_counts_once_a_rank, "gradient norms of groups", ranks=2
    ),
    "a rank trains on another's data": Fault(a_rank_trains_on_anothers_data, "data", ranks=2),
    "the weights are stale after a save": Fault(the_weights_are_stale_after_a_save, "loss"),
    "the last micro-batch is dropped": Fault(the_last_micro_batch_is_dropped, "data"),
    "gradients stay from step to step": Fault(gradients_stay_from_step_to_step, "gradient norms of groups"),
    "the gradients of experts are divided twice": Fault(
        the_gradients_of_experts_are_divided_twice, "gradient norms of groups"
    ),
    "no weight decays": Fault(no_weight_decays, UPDATE),
    "beta2 is not what it says": Fault(beta2_is_not_what_it_says, UPDATE),
    "a layer is never updated": Fault(a_layer_is_never_updated, UPDATE),
}
