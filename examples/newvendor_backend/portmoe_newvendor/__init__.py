"""A backend for portmoe, found through the entry point in pyproject.toml."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portmoe.accelerator import Accelerator, Preflight


def accelerator() -> "Accelerator":
    """The entry point of the group ``portmoe.backends``."""
    from portmoe.accelerator import Accelerator
    from portmoe_newvendor.collectives import NewvendorCollectives
    from portmoe_newvendor.device import NewvendorDevice
    from portmoe_newvendor.memory import NewvendorMemory
    from portmoe_newvendor.ops import NewvendorOperations

    return Accelerator(
        "newvendor",
        NewvendorDevice(),
        NewvendorCollectives(),
        NewvendorOperations(),
        NewvendorMemory(),
        priority=-1,  # after the CPU, because it only simulates; a real one leaves this out
    )


def preflight() -> "Preflight":
    """What is known before torch is imported."""
    from portmoe.accelerator import Preflight
    from portmoe_newvendor.probe import ENVIRONMENT, software

    return Preflight(software, ENVIRONMENT)
