"""How a stand-in is registered, and what a documented constraint is.

The schemas are those of one release: ``SIMULATED_NPU_RELEASE``, by default the one this plug-in stands for.
"""

import inspect
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from torch_npu.faults import npu_product, subject_to_faults

RELEASE = os.environ.get("SIMULATED_NPU_RELEASE", "2.13.0")
SIGNATURES = Path(__file__).parents[4] / "vendors" / "signatures.json"
SCHEMAS: dict[str, str] = json.loads(SIGNATURES.read_text())["torch_npu"][RELEASE]["functions"]
PAGE = "its page, 2.13.0"

DOCUMENTED: dict[str, Callable[..., Any]] = {}
ROWS: list["Row"] = []

_library = torch.library.Library("npu", "DEF")


@dataclass(frozen=True)
class Row:
    """A constraint: what ``parameter`` must be, in words and as a condition on a call's arguments.

    ``said``: where the vendor says so. A condition that cannot be asked of these arguments (it raises) is
    not met.
    """

    parameter: str
    must: str
    holds: Callable[[Any], bool]
    said: str = PAGE
    function: str = ""

    def met_by(self, arguments: SimpleNamespace) -> bool:
        try:
            return bool(self.holds(arguments))
        except (AttributeError, IndexError, TypeError, ValueError):
            return False


def documented(
    *rows: Row, products: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a stand-in with the schemas of its name, and hold its calls to ``rows``.

    ``products``: those its page lists; none: the page has no list.
    """
    if products:
        listed = " or ".join(products)
        rows = (Row("product", f"must be {listed}", lambda a: npu_product() in products), *rows)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        mine = [Row(r.parameter, r.must, r.holds, r.said, name) for r in rows]
        signature = inspect.signature(function)

        def checked(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = SimpleNamespace(**bound.arguments)
            for parameter, value in bound.arguments.items():
                _check_on_device(name, parameter, value)
            for row in mine:
                check(row.met_by(arguments), f"{name}: {row.parameter} {row.must} ({row.said})")
            return function(*args, **kwargs)

        checked.__name__, checked.__doc__ = name, function.__doc__
        checked.without_autograd = getattr(function, "without_autograd", False)
        overloads = [full for full in SCHEMAS if full.partition(".")[0] == name]
        for full in overloads:
            _library.define(SCHEMAS[full])
            _library.impl(full, subject_to_faults(checked), "CompositeImplicitAutograd")
        ROWS.extend(mine)
        if overloads:
            DOCUMENTED[name] = getattr(torch.ops.npu, name)
        return function

    return register


def without_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """The vendor registers no gradient for it."""
    wrapped = torch.no_grad()(function)
    wrapped.without_autograd = True
    return wrapped


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"{message} (simulated npu)")


def _check_on_device(name: str, parameter: str, value: Any) -> None:
    for tensor in value if isinstance(value, list | tuple) else (value,):
        if isinstance(tensor, torch.Tensor):
            check(tensor.device.type == "npu", f"{name}: {parameter} is on {tensor.device}, not on the npu")


# Conditions that many functions share.

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)


def dtype(parameter: str, *allowed: torch.dtype, said: str = PAGE) -> Row:
    """Of one of these types, where it is given."""
    names = " or ".join(re.sub(r"torch\.", "", str(kind)) for kind in allowed)

    def holds(a: Any) -> bool:
        tensor = getattr(a, parameter)
        return tensor is None or tensor.dtype in allowed

    return Row(parameter, f"must be {names}", holds, said)


def like(parameter: str, other: str, said: str = PAGE) -> Row:
    """Of the other's type, where it is given."""

    def holds(a: Any) -> bool:
        tensor = getattr(a, parameter)
        return tensor is None or tensor.dtype == getattr(a, other).dtype

    return Row(parameter, f"must have the dtype of {other}", holds, said)


def dims(parameter: str, least: int, most: int | None = None, said: str = PAGE) -> Row:
    """With that many dimensions, where it is given."""
    most = least if most is None else most

    def holds(a: Any) -> bool:
        tensor = getattr(a, parameter)
        return tensor is None or least <= tensor.dim() <= most

    wanted = str(least) if least == most else f"{least} to {most}"
    return Row(parameter, f"must have {wanted} dimensions", holds, said)


def only(parameter: str, *allowed: Any, said: str = PAGE) -> Row:
    """One of these values."""
    values = " or ".join(map(repr, allowed))
    return Row(parameter, f"may only be {values}", lambda a: getattr(a, parameter) in allowed, said)


def not_simulated(*parameters: str) -> Row:
    """Documented, but of no use here: the stand-in does not know it."""
    names = ", ".join(parameters)
    return Row(
        names,
        "is not simulated",
        lambda a: all(getattr(a, parameter) is None for parameter in parameters),
        "this stand-in",
    )
