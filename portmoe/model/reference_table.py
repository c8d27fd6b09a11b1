"""The table a module uses when it is given none."""

from portmoe.ops import OPERATIONS, OpTable


def reference_table() -> OpTable:
    """Every operation's plain reference: right on any device, fast on none."""
    return OpTable({name: operation.reference for name, operation in OPERATIONS.items()}, choices=())
