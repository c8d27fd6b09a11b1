"""The table with made-up implementations: which one is chosen, and what is written down about the others."""

import copy
import json
import time

import pytest
import torch
from agreement import workload

from portmoe.config import Config
from portmoe.config.sections.execution import OpsConfig
from portmoe.config.sections.experts import MoeConfig
from portmoe.errors import BackendError, ConfigError
from portmoe.families.internlm_moe.section import ModelConfig
from portmoe.ops import OPERATIONS, Implementation, Operation, choose
from portmoe.ops.cross_entropy import CUT_VOCABULARY
from portmoe.ops.operation import Sample, rounding


def double(x):
    return x * 2


def fast(x):
    return x + x


def slow(x):
    time.sleep(0.005)
    return x + x


def broken(x):
    raise RuntimeError("no such kernel")


def operation(name, reference=double):
    def samples(workload, generator):
        return [Sample("one", (torch.randn(workload.tokens, generator=generator, requires_grad=True),))]

    return Operation(name, reference, samples, rounding(1))


def config(*, fused=False, tutel=False, rearrange=False, flash=False, **ops):
    return Config(
        moe=MoeConfig(use_fused_gating=fused, use_tutel=tutel, enable_token_rearrange_opt=rearrange),
        model=ModelConfig(use_flash_attn=flash),
        ops=OpsConfig(**ops),
    )


def pick(offered, settings=None, *, name="topk_gating", reference=double):
    log = []
    table = choose({name: operation(name, reference)}, offered, workload(), settings or config(), log.append)
    return table, table.record()[name], log


def candidates(record):
    return {c["name"]: (c["chosen"], c["usable"], c["reason"]) for c in record["candidates"]}


def test_the_first_in_order_that_supports_the_case():
    offered = [
        Implementation("topk_gating", "a", broken, lambda w: f"{w.tokens} tokens are too few"),
        Implementation("topk_gating", "b", fast),
        Implementation("topk_gating", "c", slow),
    ]
    table, record, log = pick(offered)
    assert table.topk_gating is fast
    assert record["chosen"] == "b"
    assert candidates(record) == {
        "a": (False, False, "24 tokens are too few"),
        "b": (True, True, "the first in the backend's order that supports the case"),
        "c": (False, True, "after 'b' in the backend's order"),
        "reference": (False, True, "after 'b' in the backend's order"),
    }
    assert log == []
    json.dumps(table.record())


def test_the_reference_when_nothing_is_offered():
    table, record, _ = pick([])
    assert table.topk_gating is double
    assert candidates(record)["reference"][0]


def test_an_optional_part_of_a_contract_goes_only_to_who_says_that_it_handles_it():
    offered = [
        Implementation("cross_entropy", "of_today", broken),
        Implementation("cross_entropy", "cut_too", fast, handles=(CUT_VOCABULARY,)),
    ]
    operations = {"cross_entropy": OPERATIONS["cross_entropy"]}
    for parts, chosen in ((1, "of_today"), (2, "cut_too")):
        record = choose(operations, offered, workload(vocab_parts=parts), config()).record()["cross_entropy"]
        assert record["chosen"] == chosen
    assert candidates(record)["of_today"] == (
        False,
        False,
        "it does not take a vocabulary that is cut over ranks",
    )
    only = choose(operations, offered[:1], workload(vocab_parts=2), config())
    assert only.cross_entropy is OPERATIONS["cross_entropy"].reference


def test_disabled_implementations_are_passed_over():
    offered = [Implementation("topk_gating", "a", slow), Implementation("topk_gating", "b", fast)]
    table, record, _ = pick(offered, config(disable=["topk_gating.a", "topk_gating.reference"]))
    assert table.topk_gating is fast
    assert candidates(record)["a"] == (False, False, "switched off by ops.disable")
    assert candidates(record)["reference"] == (False, False, "switched off by ops.disable")


def test_a_name_that_disables_nothing_is_refused():
    with pytest.raises(
        ConfigError, match=r"'topk_gating\.x' is no implementation here; allowed: .*topk_gating\.a"
    ):
        pick([Implementation("topk_gating", "a", fast)], config(disable=["topk_gating.x"]))


def test_disabling_everything_is_refused():
    with pytest.raises(ConfigError, match=r"take topk_gating\.reference out of ops\.disable"):
        pick([], config(disable=["topk_gating.reference"]))


@pytest.mark.parametrize(
    ("asked", "key", "name"),
    [
        ({"fused": True}, "moe.use_fused_gating", "topk_gating"),
        ({"tutel": True}, "moe.use_tutel", "topk_gating"),
        ({"rearrange": True}, "moe.enable_token_rearrange_opt", "dispatch"),
        ({"rearrange": True}, "moe.enable_token_rearrange_opt", "combine"),
        ({"flash": True}, "model.use_flash_attn", "attention"),
    ],
)
class TestRequests:
    def test_considered_only_while_asked_for(self, asked, key, name):
        offered = [Implementation(name, "quick", fast, requested_by=key)]
        _, record, log = pick(offered, config(), name=name)
        assert record["chosen"] == "reference"
        assert candidates(record)["quick"] == (False, False, f"not asked for: {key} is false")
        assert log == []
        _, record, log = pick(offered, config(**asked, fallback="error"), name=name)
        assert record["chosen"] == "quick"
        assert log == []
        assert record["unmet"] == ()

    def test_missing(self, asked, key, name):
        _, record, log = pick([], config(**asked, fallback="allow"), name=name)
        assert record["chosen"] == "reference"
        assert log == []
        (unmet,) = record["unmet"]
        assert unmet.startswith(f"{key} is not met: {name}.reference")
        _, _, log = pick([], config(**asked, fallback="warn"), name=name)
        assert len(log) == 1
        assert log[0].startswith(f"{key} is not met: {name}.reference")
        assert "this backend offers none" in log[0]
        with pytest.raises(BackendError, match=f"{key} is not met.*set {key} to false"):
            pick([], config(**asked, fallback="error"), name=name)

    def test_unsupported_or_switched_off(self, asked, key, name):
        offered = [Implementation(name, "quick", fast, lambda w: "odd shape", requested_by=key)]
        _, record, log = pick(offered, config(**asked, fallback="warn"), name=name)
        assert record["chosen"] == "reference"
        assert "quick: odd shape" in log[0]
        with pytest.raises(BackendError, match="odd shape"):
            pick(offered, config(**asked, fallback="error"), name=name)
        offered = [Implementation(name, "quick", fast, requested_by=key)]
        settings = config(**asked, fallback="error", disable=[f"{name}.quick"])
        with pytest.raises(BackendError, match=r"switched off by ops\.disable"):
            pick(offered, settings, name=name)

    def test_usable_but_not_preferred_is_told_and_no_error(self, asked, key, name):
        offered = [Implementation(name, "first", fast), Implementation(name, "quick", slow, requested_by=key)]
        _, record, _ = pick(offered, config(**asked, fallback="error"), name=name)
        assert record["chosen"] == "first"
        _, _, log = pick(offered, config(**asked, fallback="warn"), name=name)
        assert "quick: after 'first' in the backend's order" in log[0]


def test_measuring_takes_the_faster_one_whatever_the_order():
    for offered in (
        [Implementation("topk_gating", "slow", slow), Implementation("topk_gating", "fast", fast)],
        [Implementation("topk_gating", "fast", fast), Implementation("topk_gating", "slow", slow)],
    ):
        table, record, _ = pick(offered, config(select="measure"), reference=slow)
        assert table.topk_gating is fast
        seconds = {c["name"]: c["seconds"] for c in record["candidates"]}
        assert seconds["fast"] < 0.005 <= min(seconds["slow"], seconds["reference"])
        assert candidates(record)["slow"] == (False, True, "slower here than 'fast'")
        assert candidates(record)["fast"] == (True, True, "the fastest here")


def test_measuring_skips_what_cannot_run():
    offered = [
        Implementation("topk_gating", "unfit", broken, lambda w: "odd shape"),
        Implementation("topk_gating", "broken", broken),
    ]
    table, record, log = pick(offered, config(select="measure"))
    assert table.topk_gating is double
    assert candidates(record)["unfit"] == (False, False, "odd shape")
    assert candidates(record)["broken"] == (False, False, "failed when timed: RuntimeError: no such kernel")
    assert log == ["topk_gating.broken failed when timed: RuntimeError: no such kernel"]


def test_measuring_includes_the_backward_pass():
    class SlowBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.02)
            return grad * 2

    offered = [Implementation("topk_gating", "a", SlowBackward.apply)]
    # The forward pass alone would speak for "a".
    assert pick(offered, config(select="measure"), reference=slow)[1]["chosen"] == "reference"


def test_offers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="no operation"):
        pick([Implementation("topk_gatign", "a", fast)])
    with pytest.raises(ValueError, match="two implementations called 'a'"):
        pick([Implementation("topk_gating", "a", fast), Implementation("topk_gating", "a", slow)])
    with pytest.raises(ValueError, match="two implementations called 'reference'"):
        pick([Implementation("topk_gating", "reference", fast)])


class TestCallSites:
    """One operation in several places of a model, each with shapes of its own."""

    wide = Implementation("swiglu", "wide", fast, lambda w: None if w.ffn_width > 24 else "too narrow")

    def table(self, sites, **options):
        operations = {name: operation(name) for name in ("swiglu", "rms_norm")}
        return choose(operations, [self.wide], {"swiglu": sites}, config(**options))

    def test_each_is_chosen_for_its_own_shapes(self):
        table = self.table({"": workload(), "shared": workload(ffn_width=99), "dense": workload()})
        assert table.swiglu is table.at("dense").swiglu is double
        assert table.at("shared").swiglu is fast
        assert table.at("elsewhere").swiglu is double  # the default site's
        assert table.at("shared").at("dense").swiglu is double
        record = table.at("shared").record()
        assert record.keys() == {"swiglu", "swiglu@shared", "rms_norm"}
        assert record["swiglu"]["sites"] == ("", "dense")  # equal shapes: one choice
        assert record["swiglu"]["workload"]["ffn_width"] == 24
        assert candidates(record["swiglu"])["wide"] == (False, False, "too narrow")
        assert record["swiglu@shared"]["chosen"] == "wide"
        assert record["swiglu@shared"]["workload"]["ffn_width"] == 99
        json.dumps(record)

    def test_what_is_not_called_gets_nothing_and_says_so(self):
        table = self.table({"": workload()})
        assert table.record()["rms_norm"]["chosen"] is None
        assert {reason for _, _, reason in candidates(table.record()["rms_norm"]).values()} == {
            "the operation is not called in this model"
        }
        with pytest.raises(AttributeError, match="'rms_norm' is not called in this model"):
            table.rms_norm  # noqa: B018

    def test_an_operation_without_a_default_site(self):
        table = self.table({"shared": workload(), "dense": workload(ffn_width=99)})
        assert table.record().keys() == {"swiglu@shared", "swiglu@dense", "rms_norm"}
        assert table.at("dense").swiglu is fast
        with pytest.raises(AttributeError, match="'swiglu' has no default site; its sites: shared, dense"):
            table.swiglu  # noqa: B018

    def test_a_request_is_judged_at_every_site(self):
        flash = Implementation(
            "attention",
            "flash",
            fast,
            lambda w: None if w.head_dim < 9 else "too wide",
            "model.use_flash_attn",
        )
        sites, log = {"": workload(), "wide": workload(head_dim=16)}, []
        operations = {"attention": operation("attention")}
        table = choose(operations, [flash], {"attention": sites}, config(flash=True), log.append)
        assert table.attention is fast
        assert log == [
            "model.use_flash_attn is not met at wide: attention.reference computes the same function instead "
            "(flash: too wide)"
        ]
        assert table.record()["attention@wide"]["unmet"] == tuple(log)
        assert choose(operations, [flash], {}, config(flash=True, fallback="error")).choices[0].unmet == ()

    def test_every_function_can_be_wrapped_at_its_site(self):
        table = self.table({"": workload(), "shared": workload(ffn_width=99)})
        wrapped = table.at("shared").wrapped(lambda op, site, function: (op, site, function))
        assert wrapped.swiglu == ("swiglu", "shared", fast)
        assert wrapped.at("").swiglu == ("swiglu", "", double)
        assert wrapped.record() == table.record()

    def test_sites_of_no_operation_are_refused(self):
        with pytest.raises(ValueError, match="call sites of softmax, which is no operation"):
            choose({}, [], {"softmax": {"": workload()}}, config())


def test_the_table_holds_every_operation_and_names_them_when_asked_for_another():
    table = choose(OPERATIONS, [], workload(), config())
    assert table.record().keys() == OPERATIONS.keys()
    assert all(getattr(table, name) is op.reference for name, op in OPERATIONS.items())
    with pytest.raises(AttributeError, match="no operation 'softmax'; operations: rms_norm"):
        table.softmax  # noqa: B018
    assert copy.deepcopy(table).record() == table.record()
