"""How far two runs of the same mathematics may be apart, and why. See docs/validation.md."""

from dataclasses import dataclass


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
    """

    loss: float
    norm: float
    layer_norm: float
    first_norm: float
    first_layer_norm: float
    dropped: float
    loss_steps: int
    norm_steps: int


FLOAT32 = Thresholds(
    loss=1e-5,
    norm=1e-3,
    layer_norm=2e-3,
    first_norm=1e-5,
    first_layer_norm=2e-5,
    dropped=0.002,
    loss_steps=100,
    norm_steps=100,
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
)


def thresholds_of(dtype: str) -> Thresholds:
    """Return the thresholds of a ``model.dtype``; tf32 and both 16-bit types share the wider ones."""
    return FLOAT32 if dtype.removeprefix("torch.") == "float32" else BFLOAT16
