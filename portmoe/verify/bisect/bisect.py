"""The first operation of a training step that a backend computes wrong.

One micro-batch goes forward and backward through the plain references, and every operation's arguments and
upstream gradients are kept. Each is then computed again on the backend from just these, so that an error
made before it cannot be blamed on it, and compared with float64 (see ``answers``). The walk goes forward,
then backward, then to the update.

Last the whole model runs on the backend by itself. What lies between the operations shows there: sums,
casts, the tables of the rotary embedding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from portmoe.accelerator import get_accelerator
from portmoe.config import Config
from portmoe.config.read import default_model
from portmoe.config.sections.execution import ParallelConfig
from portmoe.data import Batch, open_data, with_total_steps
from portmoe.launch.ranks import detect
from portmoe.model.decoder import Decoder
from portmoe.model.reference_table import reference_table
from portmoe.ops import OPERATIONS, OpTable
from portmoe.ops.operation import Sample
from portmoe.ops.table import REFERENCE
from portmoe.parallel.layout import Layout
from portmoe.planning.memory_check import require_memory
from portmoe.record.origin import of_report
from portmoe.record.progress import Progress
from portmoe.training.engine import mean_loss, objective_of
from portmoe.training.loss_scale import LossScale
from portmoe.training.operations import choose_operations
from portmoe.training.schedule import beta2, learning_rate
from portmoe.verify.bisect.answers import Deviation, deviations
from portmoe.verify.bisect.whole_model import Whole, compare_steps
from portmoe.verify.runs.recording import PLAIN, Call, Recorder
from portmoe.verify.runs.thresholds import thresholds_of

Phase = Literal["forward", "backward", "update"]
UPDATE = "adamw"


@dataclass(frozen=True)
class Step:
    """One micro-batch through one model."""

    model: Decoder
    calls: Sequence[Call]
    loss: float
    aux_loss: float


@dataclass(frozen=True)
class Judged:
    """One call on the backend.

    Attributes:
        implementation: as in "torch"; "" for an operation that is not in the table.
        deviations: of each of its results.
    """

    place: str
    operation: str
    implementation: str
    deviations: Sequence[Deviation]

    def worst(self, phase: Phase) -> Deviation | None:
        """The worst of its deviations in one phase; None where it has none there."""
        if (phase == "update") != (self.operation == UPDATE):
            return None
        wanted = "forward" if phase == "update" else phase
        mine = [d for d in self.deviations if d.direction == wanted]
        return max(mine, key=lambda d: d.badness, default=None)

    @property
    def subject(self) -> str:
        """The implementation with its operation, as in "rms_norm.torch"."""
        return f"{self.operation}.{self.implementation}" if self.implementation else self.operation


@dataclass(frozen=True)
class Defect:
    """A result that rounding does not explain."""

    phase: Phase
    judged: Judged
    deviation: Deviation


@dataclass
class Bisection:
    """What the walk found.

    Attributes:
        calls: every call in the order of the forward pass, the update last.
        replacements: what would compute an operation if its implementation were switched off.
        whole: the whole model by itself.
        provenance: as ``of_report`` gives it.
    """

    config: Config
    reference: str
    backend: str
    device: str
    tokens: int
    calls: list[Judged]
    replacements: dict[str, str | None]
    whole: Whole
    notes: list[str] = field(default_factory=list)
    provenance: Mapping[str, object] = field(default_factory=dict)

    def defects(self) -> Iterator[Defect]:
        """Yield every defect in the order of the walk."""
        phases: list[tuple[Phase, Sequence[Judged]]] = [
            ("forward", self.calls),
            ("backward", self.calls[::-1]),
            ("update", self.calls),
        ]
        for phase, order in phases:
            for judged in order:
                worst = judged.worst(phase)
                if worst is not None and worst.defect:
                    yield Defect(phase, judged, worst)

    @property
    def passed(self) -> bool:
        """Whether every operation and the whole model agree."""
        return not any(self.defects()) and self.whole.passed


def bisect(config: Config, reference: str, backend: str, progress: Progress) -> Bisection:
    """Walk one step of ``config``; its seed decides weights and data.

    Args:
        reference: the backend whose plain references are trusted.
        backend: the backend under suspicion, with the implementations training would choose.
        progress: is told what comes next, and what is found wrong.

    Raises:
        ConfigError: a backend does not exist, or the data do not fill a step.
        BackendError: one of the two cannot be used here, or has not the memory.
    """
    config = _in_one_process(config)
    layout = Layout.plan(config, 1)
    if config.data.total_steps is None:  # the schedule is asked for the first step's rate
        config = with_total_steps(config, 1, layout.micro_num)
    suspect = get_accelerator(backend)
    device = suspect.open(0)
    trusted = suspect if reference == suspect.name else get_accelerator(reference)
    home = device if trusted is suspect else trusted.open(0)
    for accelerator in {a.name: a for a in (suspect, trusted)}.values():
        require_memory(config, layout, accelerator, detect("local"))
    notes = default_model(config)
    table = choose_operations(config, layout, suspect, device, 0, lambda value: value, notes.append)
    with open_data(config, rank=0, size=1, micro_num=layout.micro_num) as stream:
        batch = stream.batches(0)[0]

    progress("the reference", 0, 0)
    trusted_step = _step(config, reference_table(), batch, home)
    calls = [*trusted_step.calls, _update(config, trusted_step.model)]
    judged = []
    for number, made in enumerate(calls):
        progress(made.name, number, len(calls))
        function, implementation = _on_backend(made, table)
        found = list(deviations(made, function, device, home))
        judged.append(Judged(made.place, made.operation.name, implementation, found))
        for wrong in (deviation for deviation in found if deviation.defect):
            progress.say(
                f"[FAIL] {made.place}: {judged[-1].subject}, {wrong.direction}: {wrong.tensor}", "red"
            )
    progress("the whole model", len(calls), len(calls))
    whole = _whole(config, trusted_step, table, batch, device)
    return Bisection(
        config=config,
        reference=trusted.name,
        backend=suspect.name,
        device=suspect.device.name(),
        tokens=len(batch.tokens_T),
        calls=judged,
        replacements=_replacements(table),
        whole=whole,
        notes=notes,
        provenance=of_report(suspect.device.probe().facts, config.run.seed),
    )


def _in_one_process(config: Config) -> Config:
    """Without what only lays out the work: parallelism, and activations recomputed, every call made twice."""
    model = config.model.model_copy(update={"checkpoint": False, "num_chunks": 1})
    return config.model_copy(update={"model": model, "parallel": ParallelConfig()})


def _step(
    config: Config, table: OpTable, batch: Batch, device: torch.device, weights: Decoder | None = None
) -> Step:
    """Forward and backward as training does them; ``weights``: a model to take them from."""
    with device:
        model = Decoder(config, table)
    if weights is not None:
        model.load_state_dict(weights.state_dict())
    model.train()
    recorder = Recorder(model)
    batch = batch.to(device)
    output = model(batch.tokens_T, batch)
    loss = mean_loss(output, batch)
    scale = LossScale(config.grad_scaler, config.model.dtype).scale
    (objective_of(loss, output, model.architecture.balance) * scale).backward()
    return Step(model, recorder.calls, loss.item(), output.aux_loss.item())


def _update(config: Config, model: Decoder) -> Call:
    """The first update, with the gradients of the reference; they are not clipped."""
    scale = LossScale(config.grad_scaler, config.model.dtype).scale
    parameters = list(model.parameters())
    params = [p.detach().clone() for p in parameters]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad / scale for p in parameters]
    moments = ([torch.zeros_like(p) for p in params] for _ in range(2))
    settings = {
        "lr": learning_rate(config, 0),
        "beta1": config.adam.adam_beta1,
        "beta2": beta2(config, 0),
        "eps": config.adam.adam_eps,
        "weight_decay": config.adam.weight_decay,
    }
    return Call("optimizer", OPERATIONS[UPDATE], Sample("first step", (params, grads, *moments, 1), settings))


def _on_backend(made: Call, table: OpTable) -> tuple[Callable, str]:
    """What computes this call there, and its name; "" where nothing was chosen."""
    name = made.operation.name
    if name in PLAIN:
        return made.operation.reference, ""
    chosen = {(choice.op, site): choice.chosen for choice in table.choices for site in choice.sites}
    return getattr(table.at(made.site), name), chosen.get((name, made.site)) or chosen[name, ""]


def _replacements(table: OpTable) -> dict[str, str | None]:
    """ "rms_norm.torch" → the next candidate that can be used; None where the reference itself was chosen."""
    found: dict[str, str | None] = {}
    for choice in (choice for choice in table.choices if choice.chosen):
        usable = [c.name for c in choice.candidates if c.usable and not c.chosen]
        found[f"{choice.op}.{choice.chosen}"] = usable[0] if usable and choice.chosen != REFERENCE else None
    return found


def _whole(config: Config, trusted: Step, table: OpTable, batch: Batch, device: torch.device) -> Whole:
    try:
        other = _step(config, table, batch, device, trusted.model)
    except RuntimeError as error:
        return Whole(raised=f"{type(error).__name__}: {error}")
    limits = thresholds_of(config.model.dtype)
    return compare_steps(trusted, other, limits)
