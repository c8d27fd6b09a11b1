"""How far two runs of the same mathematics may be apart, and why. See docs/validation.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["loss", "norm", "layer", "dropped", "load"]
Family = Literal["losses", "norms", "shares"]
# Quantities of a family part together: rounding that shows in one has reached the others.
FAMILIES: Mapping[Kind, Family] = {
    "loss": "losses",
    "norm": "norms",
    "layer": "norms",
    "dropped": "shares",
    "load": "shares",
}
# Deviations at which two runs are strangers in a quantity.
STRANGERS: Mapping[Family, float] = {"losses": 0.02, "norms": 0.1, "shares": 0.01}


@dataclass(frozen=True)
class Thresholds:
    """Allowed relative deviations.

    Attributes:
        loss: of the loss and the auxiliary loss, per step.
        norm: of a parameter group's gradient norm, per step.
        layer_norm: of one layer's share of it, per step.
        first_norm, first_layer_norm: the same in the first step, where both runs have the same weights and
            nothing but rounding can differ.
        dropped: of the rate of dropped tokens, as an absolute difference.
        loss_steps: for how many steps the losses' bands hold; later steps are reported and not judged.
        norm_steps: the same for norms and dropped tokens. In 16-bit types rounding changes some choices of
            experts after few steps, and then the norms of two right runs part although their losses do not.
        loss_moves, norm_moves: the bands hold without twins while the learning rates of the steps before add
            up to no more: AdamW moves a weight by about its rate a step, and with it what rounding made.
    """

    loss: float
    norm: float
    layer_norm: float
    first_norm: float
    first_layer_norm: float
    dropped: float
    loss_steps: int
    norm_steps: int
    loss_moves: float
    norm_moves: float

    def band(self, kind: Kind) -> float:
        """What a quantity of this kind may deviate by in a step, as long as rounding has not grown."""
        layer = self.layer_norm if kind == "layer" else self.norm
        return {"losses": self.loss, "norms": layer, "shares": self.dropped}[FAMILIES[kind]]

    def first_band(self, kind: Kind) -> float:
        """The same in the first step of both runs."""
        return {"norm": self.first_norm, "layer": self.first_layer_norm}.get(kind) or self.band(kind)

    def strangers(self, kind: Kind) -> float:
        """The deviation at which steps say nothing any more."""
        return max(STRANGERS[FAMILIES[kind]], 2 * self.band(kind))


FLOAT32 = Thresholds(
    loss=1e-5,
    norm=1e-3,
    layer_norm=2e-3,
    first_norm=1e-5,
    first_layer_norm=2e-5,
    dropped=0.002,
    loss_steps=100,
    norm_steps=100,
    loss_moves=2.5e-3,
    norm_moves=2.5e-3,
)
BFLOAT16 = Thresholds(
    loss=2e-2,
    norm=0.1,
    layer_norm=0.2,
    first_norm=0.1,
    first_layer_norm=0.2,
    dropped=0.03,
    loss_steps=100,
    norm_steps=10,
    loss_moves=2.5e-3,
    norm_moves=2e-4,
)


def thresholds_of(dtype: str) -> Thresholds:
    """Return the thresholds of a ``model.dtype``; tf32 and both 16-bit types share the wider ones."""
    return FLOAT32 if dtype.removeprefix("torch.") == "float32" else BFLOAT16
