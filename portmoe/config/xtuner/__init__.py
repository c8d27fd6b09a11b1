"""Carrying an XTuner config, a Python file, over without executing it."""

from portmoe.config.xtuner.importer import carried_over, is_config

__all__ = ["carried_over", "is_config"]
