"""Map the repository's top-level rooms into the one import package ``portmoe``.

``backends/``, ``cli/`` and ``configs/`` live beside ``portmoe/`` in the tree so that a reader
finds them at once, and become ``portmoe.backends``, ``portmoe.cli`` and ``portmoe.configs`` when
installed, so that no module called ``backends`` or ``cli`` lands in a user's import path.
"""

from pathlib import Path

from setuptools import setup

ROOMS = {
    "portmoe": "portmoe",
    "portmoe.backends": "backends",
    "portmoe.cli": "cli",
    "portmoe.configs": "configs",
}


def packages() -> dict[str, str]:
    """Return {import name: folder} for every room and each Python package inside it."""
    found = {}
    for name, folder in ROOMS.items():
        found[name] = folder
        for init in sorted(Path(folder).rglob("*/__init__.py")):
            inner = init.parent.relative_to(folder)
            found[".".join((name, *inner.parts))] = init.parent.as_posix()
    return found


setup(
    packages=list(packages()),
    package_dir=packages(),
    package_data={
        "": ["*.jinja"],  # chat templates
        "portmoe": ["py.typed"],
        "portmoe.backends.cpu": ["*.c", "*.h"],
        "portmoe.configs": ["*.yaml"],
        "portmoe.configs.conversations": ["*.jsonl", "train/*", "tokenizer/*"],
        "portmoe.record": ["*.css"],
        "portmoe.verify.runs": ["*.json", "*.yaml"],
    },
)
