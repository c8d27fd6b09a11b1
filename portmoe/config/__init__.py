"""The keys of a run: the typed schema, reading YAML, messages for mistakes, other programs' files.

Imports neither torch nor numpy, so that a mistake in a config is reported at once.
"""

from portmoe.config.schema import Config, parse_step_ranges

__all__ = ["Config", "parse_step_ranges"]
