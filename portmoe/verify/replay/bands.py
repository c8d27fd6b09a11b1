"""How far a step computed again may be from the recorded one, and why: see docs/validation.md."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Bands:
    """Allowed deviations, relative unless stated.

    Attributes:
        exact: of what no device computes: learning rate, beta2, loss scale.
        loss: of loss and auxiliary loss.
        dropped: of the rate of dropped tokens, as a difference.
        load: of an expert's share of the assignments, as a difference.
        norm: of the gradient norm of a group.
        layer_norm: of one layer's share of it.
        parameter_norm: of one parameter's.
        change: of how far a parameter moved.
        floor: a parameter's norm counts against at least this share of the largest of its kind.
    """

    exact: float
    loss: float
    dropped: float
    load: float
    norm: float
    layer_norm: float
    parameter_norm: float
    change: float
    floor: float


FLOAT32 = Bands(
    exact=1e-12,
    loss=2e-5,
    dropped=0.002,
    load=0.002,
    norm=3e-5,
    layer_norm=5e-5,
    parameter_norm=1e-4,
    change=1e-4,
    floor=1e-3,
)
BFLOAT16 = Bands(
    exact=1e-12,
    loss=5e-2,
    dropped=0.01,
    load=0.01,
    norm=0.1,
    layer_norm=0.15,
    parameter_norm=0.25,
    change=0.1,
    floor=1e-2,
)


def bands_of(dtypes: Collection[str]) -> Bands:
    """Return the bands where these dtypes of ``model.dtype`` meet; tf32 and the 16-bit types share theirs."""
    return FLOAT32 if set(dtypes) == {"float32"} else BFLOAT16
