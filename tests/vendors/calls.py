"""The calls of a vendor's functions in source code, and whether a Python signature takes them."""

import ast
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SIGNATURES = json.loads(Path(__file__).with_name("signatures.json").read_text())
BACKENDS = Path(__file__).parents[2] / "backends"


@dataclass(frozen=True)
class Found:
    """A call in a file: the function as written, how many positional arguments, which keywords."""

    function: str
    positional: int
    keywords: tuple[str, ...]
    place: str


def calls(sources: Sequence[Path]) -> Iterator[Found]:
    """Every call of a dotted name, or of a name bound by an import or to a call's result."""
    for source in sources:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        imported = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                first, dot, rest = name.partition(".")
                full = imported.get(first, first) + dot + rest
                starred = [part for part in node.args if isinstance(part, ast.Starred)]
                assert not (starred and full.startswith("torch_npu.")), (
                    f"{source}: {name} hides its arguments"
                )
                keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
                yield Found(full, len(node.args), keywords, f"{source.name}:{node.lineno}")


def bind(signature: str, call: Found) -> str | None:
    """Why a Python signature, as "(x, dim=0)", does not take the call; None where it does."""
    namespace: dict = {}
    exec(f"def function{signature}: pass", namespace)  # our own data file's text
    try:
        inspect.signature(namespace["function"]).bind(
            *([None] * call.positional), **dict.fromkeys(call.keywords)
        )
    except TypeError as error:
        return str(error)
    return None
