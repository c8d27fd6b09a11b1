"""How full the packs are, and how many steps the epochs of a run take."""

from dataclasses import dataclass

from portmoe.config import Config
from portmoe.data.packs import Packs, open_packs
from portmoe.errors import ConfigError


@dataclass(frozen=True)
class PackSummary:
    """What packing has made of the training data.

    Attributes:
        rows: of ``seq_len`` tokens, in ``packs`` micro-batches.
        padding: tokens that fill rows up.
        left_out: tokens of samples that no epoch takes: what fills no pack, with the benchmark's packing.
        divided: samples that do not lie in one row, or pack, as a whole.
        steps_per_epoch: need not be whole: an epoch may begin and end inside a step.
    """

    samples: int
    tokens: int
    seq_len: int
    rows: int
    packs: int
    padding: int
    left_out: int
    divided: int
    steps_per_epoch: float
    total_steps: int

    @property
    def efficiency(self) -> float:
        """The share of the rows' tokens that are of samples."""
        return 1 - self.padding / max(1, self.rows * self.seq_len)

    def __str__(self) -> str:
        """One line for a person."""
        parts = [
            f"{self.samples:,} samples, {self.tokens:,} tokens in {self.rows:,} rows of {self.seq_len:,}, "
            f"{self.efficiency:.1%} full"
        ]
        if self.divided:
            parts.append(f"{self.divided:,} samples are divided")
        if self.left_out:
            parts.append(f"{self.left_out:,} tokens fill no pack and are left out")
        parts.append(f"{self.steps_per_epoch:,.4g} steps an epoch, {self.total_steps:,} in all")
        return "; ".join(parts)


def summary(config: Config, packs: Packs, size: int, micro_num: int) -> PackSummary:
    """Return what packing has made of training data, for ``size`` ranks of ``micro_num`` packs a step.

    Raises ``ConfigError`` where ``data.total_steps`` and ``data.num_epochs`` do not agree.
    """
    return PackSummary(
        samples=packs.num_samples,
        tokens=packs.num_tokens,
        seq_len=config.data.seq_len,
        rows=packs.num_rows,
        packs=len(packs),
        padding=packs.padding,
        left_out=packs.left_out,
        divided=packs.divided,
        steps_per_epoch=packs.sampler(micro_num, 0, size, None).steps_per_epoch,
        total_steps=_total_steps(config, packs, size, micro_num),
    )


def with_total_steps(config: Config, size: int, micro_num: int, packs: Packs | None = None) -> Config:
    """Return the config with ``data.total_steps``, as the epochs of this data make it where they are given.

    ``packs`` is the training data, where it is open already.

    Raises ``ConfigError`` where the two do not agree, and as ``open_packs`` does.
    """
    if config.data.num_epochs is None:
        return config
    if packs is None:
        packs = open_packs(config, size, micro_num)
    steps = _total_steps(config, packs, size, micro_num)
    return config.model_copy(update={"data": config.data.model_copy(update={"total_steps": steps})})


def rows_passed_over(former: Config, step: int, packs: Packs, rows_per_step: int) -> int:
    """Return how many rows a run that is given more epochs does not take in the first of them.

    They have the places in the stream that its last step left empty.

    Args:
        former: the config it has had, with ``data.total_steps``.
        step: where it goes on.
    """
    epochs, steps = former.data.num_epochs, former.data.total_steps
    if epochs is None or former.data.packing == "benchmark" or step < steps:
        return 0
    return steps * rows_per_step - epochs * packs.num_rows


def _total_steps(config: Config, packs: Packs, size: int, micro_num: int) -> int:
    given, epochs = config.data.total_steps, config.data.num_epochs
    if epochs is None:
        return given
    steps = packs.sampler(micro_num, 0, size, epochs).steps(epochs)
    if given not in (None, steps):
        raise ConfigError(
            f"data.num_epochs={epochs} makes {steps} steps of this data, and data.total_steps={given}; set "
            "one of the two to null"
        )
    return steps
