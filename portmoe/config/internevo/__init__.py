"""Carrying an InternEvo config, a Python file, over without executing it."""

from portmoe.config.internevo.importer import carried_over

__all__ = ["carried_over"]
