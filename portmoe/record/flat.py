"""One flat object a step: what ``metrics.jsonl`` and TensorBoard hold, by names no layout changes.

Nested values become columns, as "grad_norm/experts". Runs of former versions have them nested, the parameter
groups under the benchmark's names, in which the number of ranks that share the experts stands.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

EMBEDDING, HEAD = "embedding", "head"
_FORMER_GROUPS = (
    (re.compile(r"0_default"), "default"),
    (re.compile(r"1_fp32"), "fp32"),
    (re.compile(r"2_moe_ep_size_\d+"), "experts"),
)


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Every value under a name of its own: "key/name" for a mapping's, "key/index" for a list's."""
    return dict(_columns(record.items()))


def places(norms: "list[float] | tuple[float, ...]") -> dict[str, float]:
    """Norms by place in the model, embedding first and head last, with the places' names."""
    inner = (str(layer) for layer in range(len(norms) - 2))
    return dict(zip((EMBEDDING, *inner, HEAD), norms, strict=True))


def as_now(record: Mapping[str, Any]) -> dict[str, Any]:
    """A step's object as any version wrote it, in the form of this one."""
    renamed = dict(record)
    for key in ("grad_norm", "grad_norm_layers"):
        groups = renamed.get(key)
        if isinstance(groups, Mapping):
            renamed[key] = {
                _group(name): places(value) if isinstance(value, list) else value
                for name, value in groups.items()
            }
    return flat(renamed)


def _columns(items: "Iterator[tuple[str, Any]] | Any", prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in items:
        if isinstance(value, Mapping):
            yield from _columns(value.items(), f"{prefix}{key}/")
        elif isinstance(value, list | tuple):
            yield from _columns(enumerate(value), f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _group(name: str) -> str:
    return next((now for former, now in _FORMER_GROUPS if former.fullmatch(name)), name)
