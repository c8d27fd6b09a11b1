"""The families' chat templates: each ``<name>.jinja`` in a family's folder goes by its name."""

from pathlib import Path

import portmoe.families


def chat_templates() -> dict[str, Path]:
    """Every template by its name."""
    folders = map(Path, portmoe.families.__path__)
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*/*.jinja"))}
