"""A step computed again, held to the recorded one: in the order in which a step makes its figures."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from portmoe.record.flat import EMBEDDING, HEAD
from portmoe.result import Result
from portmoe.verify.replay.bands import Bands
from portmoe.verify.runs.curves import place_name

Record = Mapping[str, Any]
TOKENS = "tokens/"
GROUP, LAYER, PARAMETER = "grad_norm/", "grad_norm_layers/", "grad_norm_parameters/"
CHANGE, LOAD = "weight_change/", "expert_load/"
# What a step begins with: no device computes it, and every layout has it alike.
SCHEDULE = {"lr": "learning rate", "adam_beta2": "beta2", "loss_scale": "loss scale"}


def judge(recorded: Record, made: Record, bands: Bands, scaled_alike: bool = True) -> Iterator[Result]:
    """Yield one result per quantity, the first of which that fails is where the two part.

    Args:
        scaled_alike: both or neither scaled their loss, as float16 does.
    """
    judged = _Judged(recorded, made, f"step {recorded['step']}")
    for key, name in SCHEDULE.items():
        if key == "loss_scale" and not scaled_alike:
            continue
        yield judged.numbers("schedule", name, {key: key}, bands.exact)
    yield judged.data()
    yield judged.numbers("forward", "loss", {"loss": "loss"}, bands.loss)
    yield judged.numbers("forward", "auxiliary loss", {"moe_loss": "auxiliary loss"}, bands.loss)
    yield judged.numbers(
        "forward", "dropped tokens", {"dropped_token_rate": "rate"}, bands.dropped, relative=False
    )
    yield judged.numbers("forward", "load", judged.columns(LOAD, "expert "), bands.load, relative=False)
    backward = (
        ("gradient norms of groups", GROUP, bands.norm, 0.0),
        ("gradient norms of layers", LAYER, bands.layer_norm, bands.floor),
        ("gradient norms of parameters", PARAMETER, bands.parameter_norm, bands.floor),
    )
    for name, prefix, band, floor in backward:
        yield judged.numbers("backward", name, judged.columns(prefix), band, floor)
    yield judged.numbers("update", "change of the weights", judged.columns(CHANGE), bands.change, bands.floor)


class _Judged:
    """Two records of one step."""

    def __init__(self, recorded: Record, made: Record, subject: str) -> None:
        self._recorded, self._made, self._subject = recorded, made, subject

    def columns(self, prefix: str, label: str = "") -> dict[str, str]:
        """The columns of either record below ``prefix``, those first that a backward pass reaches first."""
        found = dict.fromkeys(key for record in (self._recorded, self._made) for key in record)
        names = {key: label + _words(key.removeprefix(prefix)) for key in found if key.startswith(prefix)}
        return dict(
            sorted(names.items(), key=lambda item: _depth(item[0].removeprefix(prefix)), reverse=True)
        )

    def data(self) -> Result:
        """Which tokens the step saw."""
        keys = ["data_crc32", *self.columns(TOKENS), "num_consumed_tokens"]
        unlike = [key for key in keys if self._recorded.get(key) != self._made.get(key)]
        if "data_crc32" not in self._recorded:
            unlike.remove("data_crc32")
        apart = "; ".join(
            f"{key} {self._made.get(key)}, recorded {self._recorded.get(key)}" for key in unlike
        )
        return self._result("fail" if unlike else "pass", "data", "data", apart)

    def numbers(
        self,
        part: str,
        name: str,
        columns: Mapping[str, str],
        band: float,
        floor: float = 0.0,
        relative: bool = True,
    ) -> Result:
        """Hold ``columns``, key → what it is called, to the record.

        Args:
            floor: a deviation counts relative to at least this share of the largest recorded number.
        """
        pairs = {key: (self._recorded.get(key), self._made.get(key)) for key in columns}
        if not any(key in self._recorded for key in columns):
            return self._result("skip", part, name, "the run did not record it")
        if all(pair == (None, None) for pair in pairs.values()):
            return self._without_numbers(part, name)
        least = floor * max((abs(a) for a, _ in pairs.values() if a is not None), default=0.0)
        apart = {key: _apart(*pair, least, relative) for key, pair in pairs.items()}
        beyond = [key for key, deviation in apart.items() if not deviation <= band]
        worst = max(apart, key=apart.__getitem__)
        if not beyond:
            return self._result("pass", part, name, needed=apart[worst], allowed=band)
        shown = [f"{columns[beyond[0]]}: {_pair(pairs[beyond[0]])}"]
        if len(beyond) > 1:
            shown.append(
                f"{len(beyond)} of {len(columns)} beyond, most {columns[worst]}: {_pair(pairs[worst])}"
            )
        return self._result("fail", part, name, "; ".join(shown), apart[worst], band)

    def _without_numbers(self, part: str, name: str) -> Result:
        """A dense model has no drops, and a step that both skip no norms; a loss that is nowhere is none."""
        if name != "loss" and self._recorded["loss"] is not None:
            return self._result("skip", part, name, "neither has it")
        return self._result("fail", part, name, "no number in either: nothing was compared", math.inf)

    def _result(
        self,
        status: Any,
        part: str,
        name: str,
        detail: str = "",
        needed: float | None = None,
        allowed: float | None = None,
    ) -> Result:
        return Result(status, name, detail, subject=self._subject, part=part, needed=needed, allowed=allowed)


def _apart(a: float | None, b: float | None, least: float, relative: bool) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    if a == b:
        return 0.0
    scale = max(abs(a), least) if relative else 1.0
    return abs(b - a) / scale if scale else math.inf


def _pair(pair: tuple[float | None, float | None]) -> str:
    recorded, made = pair
    return f"{_number(made)}, recorded {_number(recorded)}"


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.8g}"


def _words(column: str) -> str:
    group, _, where = column.partition("/")
    return f"{group}, {place_name(where)}" if where else group


def _depth(column: str) -> tuple[int, int]:
    """How late in the forward pass a parameter or a place comes."""
    where = column.rpartition("/")[2]
    parts = where.split(".")
    if where == EMBEDDING or parts[0] == EMBEDDING:
        return 0, 0
    if where.isdecimal():
        return 1, int(where)
    if parts[0] == "layers":
        return 1, int(parts[1])
    return (2, 0) if where != HEAD else (2, 1)
