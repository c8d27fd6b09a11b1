"""Every constraint the vendor documents: a call that breaks it fails by name, and one beside it passes."""

import re

import pytest
import torch_npu
from torch_npu import faults
from torch_npu.operations import DOCUMENTED, ROWS
from violations import CALLS, LEFT_OUT, PRODUCTS

CASES = [(function, *case[:3]) for function, (_, cases) in CALLS.items() for case in cases]
NEAR = [
    (function, *case[:2], case[3]) for function, (_, cases) in CALLS.items() for case in cases if case[3:]
]


def call(function, changes):
    given = {name: v for name, v in (CALLS[function][0] | changes).items() if v is not LEFT_OUT}
    return getattr(torch_npu, function)(**given)


def rows(function, parameter, words):
    return [r for r in ROWS if (r.function, r.parameter) == (function, parameter) and words in r.must]


def test_every_constraint_has_a_call_that_breaks_it():
    broken = [row for case in CASES for row in rows(*case[:3])]
    assert [row for row in ROWS if row not in broken and row.parameter != "product"] == []
    assert {row.function for row in ROWS if row.parameter == "product"} == {*PRODUCTS}
    assert {*CALLS} == {*DOCUMENTED}
    assert all(row.said for row in ROWS)


@pytest.mark.parametrize(
    ("function", "parameter", "words", "changes"), CASES, ids=lambda part: part if type(part) is str else ""
)
def test_a_call_that_breaks_it_fails(function, parameter, words, changes):
    (row,) = rows(function, parameter, words)
    with pytest.raises(RuntimeError, match=re.escape(f"{function}: {parameter} {row.must}")):
        call(function, changes)


@pytest.mark.parametrize("function", CALLS)
def test_what_is_allowed_passes(function):
    call(function, {})
    for *_, changes in (case for case in NEAR if case[0] == function):
        call(function, changes)


@pytest.mark.parametrize("function", PRODUCTS)
def test_products_its_page_leaves_out_are_refused(function):
    for product in ("A2", "A3"):
        with faults.product(product):
            if product in PRODUCTS[function]:
                call(function, {})
            else:
                with pytest.raises(RuntimeError, match=f"{function}: product must be"):
                    call(function, {})


@pytest.mark.parametrize("function", CALLS)
def test_tensors_elsewhere_are_refused(function):
    def on_host(value):
        if isinstance(value, list) and hasattr(value[0], "cpu"):
            return [on_host(item) for item in value]
        return value.cpu() if hasattr(value, "cpu") else value

    first = next(iter(name for name, value in CALLS[function][0].items() if on_host(value) is not value))
    with pytest.raises(RuntimeError, match="on cpu, not on the npu"):
        call(function, {first: on_host(CALLS[function][0][first])})
