"""Which auxiliary losses a config asks for, of those every family can have."""

from typing import TYPE_CHECKING

from portmoe.families.architecture import Balance

if TYPE_CHECKING:
    from portmoe.config import Config


def balance(config: "Config", own: Balance) -> Balance:
    """``moe.aux_loss`` in the terms of an ``Architecture``; ``own`` is what the model was published with."""
    z = config.loss.z_loss_coeff
    if config.moe.aux_loss == "gshard":
        return Balance("first choice", config.loss.moe_loss_coeff, z)
    if config.moe.aux_loss == "none" or own.coefficient == 0:
        return Balance("none", 0.0, z)
    return Balance(own.over, own.coefficient, z)
