"""The keys of a run: the typed schema, reading YAML, messages for mistakes, other programs' files.

Imports neither torch nor numpy, so that a mistake in a config is reported at once. ``Config`` is found on
first use: a family's section stands on ``config.section``, and ``Config`` on the families.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portmoe.config.schema import Config

__all__ = ["Config"]


def __getattr__(name: str) -> Any:
    if name != "Config":
        raise AttributeError(f"module 'portmoe.config' has no attribute {name!r}")
    from portmoe.config.schema import Config

    return Config
