"""The record of a step: the benchmark's keys and meanings, and how it is printed."""

import json
import math
import re
from types import SimpleNamespace

import pytest

from portmoe import load_config
from portmoe.record.flat import as_now, flat
from portmoe.record.log_line import StepResult, perplexity, step_record, to_json, to_text
from portmoe.record.throughput import Speed
from portmoe.training.schedule import learning_rate

BENCHMARK_KEYS = [
    *("tflops", "step", "loss", "real_tgs", "tgs (tokens/gpu/second)", "tgs/last_tgs_1", "tgs/tgs_all"),
    *("tgs/tgs_avg", "tgs/tgs_SMA", "tgs/last_tgs_10", "tgs/last_tgs_50", "lr", "loss_scale", "grad_norm"),
    *("moe_loss", "micro_num", "num_consumed_tokens", "inf_nan_skip_batches", "num_samples_in_batch"),
    *("largest_length", "largest_batch", "smallest_batch", "adam_beta2", "fwd_bwd_time", "bwd_time", "acc"),
    *("perplexity", "acc/en", "acc/cn", "acc/code", "tokens/en", "tokens/cn", "tokens/code"),
    *("loss_from_metric", "loss/en", "loss/cn", "loss/code"),
]
OWN_KEYS = [
    *("model_tflops", "mfu", "trained_token_share", "padding_share", "dropped_token_rate", "expert_load"),
    *("grad_norm_layers", "step_time"),
    *("lr_next", "peak_memory", "data_crc32", "grad_norm_parameters", "weight_change"),
]


def totals(**changes):
    values = {
        "types": ("en", "cn", "code"),
        "loss": 0.32518,
        "tokens": [900_000, 0, 100_000],
        "correct": [810_000, 0, 50_000],
        "loss_sums": [180_000.0, 0.0, 120_000.0],
        "assigned": [10, 20, 30, 40],
        "kept": [10, 20, 25, 25],
        "segments": 1024,
        "largest_length": 2048,
        "largest_batch": 5,
        "smallest_batch": 2,
        "data_crc32": 0x1A2B,
        "padding": 200_000,
    }
    return SimpleNamespace(**(values | changes))


def speed(**changes):
    names = ("tgs", "real_tgs", "last_tgs_10", "last_tgs_50", "tgs_all", "tgs_avg", "tgs_sma", "tflops")
    return Speed(
        **({name: float(i) for i, name in enumerate(names)} | {"model_tflops": 9.0, "mfu": 0.5} | changes)
    )


def record(step_totals=None, step_speed=None, **changes):
    values = {
        "totals": step_totals or totals(),
        "step": 49,
        "moe_loss": 3.296875,
        "grad_norms": {"default": 1.45, "fp32": 5.75, "experts": 0.138},
        "layer_grad_norms": {"default": [1.0, 0.2, 1.05], "experts": [0.0, 0.1, 0.138]},
        "learning_rate": 8.79e-05,
        "next_learning_rate": 8.75e-05,
        "beta2": 0.95,
        "loss_scale": 65536.0,
        "skipped_steps": 3,
        "micro_num": 8,
        "consumed_tokens": 52428800,
        "step_tokens": 1_600_000,
        "step_seconds": 9.76,
        "forward_backward_seconds": 8.99,
        "backward_seconds": 5.91,
        "peak_memory": 1 << 30,
    }
    return step_record(StepResult(**(values | changes)), step_speed or speed())


def strictly(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_keys_are_the_benchmarks_in_its_order_then_ours():
    assert list(record()) == BENCHMARK_KEYS + OWN_KEYS


def test_the_text_has_every_key_once_in_order_with_the_benchmarks_spelling_of_values():
    text = to_text(record(), 4)
    positions = [text.index(f"{key}=") for key in BENCHMARK_KEYS[:5]]
    assert positions == sorted(positions)
    for part in (
        "step=49 loss=0.32518 real_tgs=1.00 tgs (tokens/gpu/second)=0.00 tgs/last_tgs_1=0.00 ",
        " lr=8.75e-05 loss_scale=65536.0 ",
        " grad_norm={'0_default': 1.45, '1_fp32': 5.75, '2_moe_ep_size_4': 0.138} moe_loss=3.296875 ",
        " micro_num=8 num_consumed_tokens=52428800 ",
        " num_consumed_tokens=52428800 inf_nan_skip_batches=3 num_samples_in_batch=1024 largest_length=2048 "
        "largest_batch=5 smallest_batch=2 adam_beta2=0.95 fwd_bwd_time=8.99 bwd_time=5.91 ",
        " acc/en=0.9 acc/cn=0.0 acc/code=0.5 tokens/en=900000 tokens/cn=0 tokens/code=100000 ",
        " loss/en=0.2 loss/cn=nan loss/code=1.2 ",
    ):
        assert part in text
    assert "\n" not in text


def test_the_rate_is_printed_after_the_schedule_moved_on_and_kept_as_it_was_used():
    """As the benchmark's log does: its line of step 49 of 200 with 2 warm-up steps."""
    config = load_config("7b_moe4")
    assert (config.data.total_steps, int(200 * config.lr_scheduler.warmup_ratio)) == (200, 2)
    rates = {"learning_rate": learning_rate(config, 49), "next_learning_rate": learning_rate(config, 50)}
    line = to_text(record(**rates), 4)
    published = re.search(r" lr=(\S+) ", line)[1]
    assert float(published) == pytest.approx(8.756803171472813e-05, rel=1e-14)
    kept = strictly(to_json(record(**rates)))
    assert kept["lr"] == rates["learning_rate"] > kept["lr_next"] == rates["next_learning_rate"]


def test_norms_by_layer_are_for_programs_only():
    step = record()
    assert step["grad_norm_layers"]["experts"] == {"embedding": 0.0, "0": 0.1, "head": 0.138}
    assert "grad_norm_layers" not in to_text(step, 4)


def test_what_a_replay_is_held_to_is_for_programs_only():
    step = record(parameter_grad_norms={"head.weight": 0.5}, weight_changes={"head.weight": 1e-4})
    assert to_text(step, 4) == to_text(record(), 4)
    columns = strictly(to_json(step))
    assert columns["data_crc32"] == "00001a2b"
    assert columns["grad_norm_parameters/head.weight"] == 0.5
    assert columns["weight_change/head.weight"] == 1e-4


def test_the_columns_of_json_are_flat_and_no_layout_changes_their_names():
    columns = strictly(to_json(record()))
    assert not [key for key, value in columns.items() if isinstance(value, dict | list)]
    assert columns["grad_norm/experts"] == 0.138
    assert columns["grad_norm_layers/default/embedding"] == 1.0
    assert columns["grad_norm_layers/experts/0"] == 0.1
    assert columns["grad_norm_layers/default/head"] == 1.05
    assert [columns[f"expert_load/{expert}"] for expert in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_what_former_versions_wrote_is_read_in_this_form():
    step = record()
    names = {"default": "0_default", "fp32": "1_fp32", "experts": "2_moe_ep_size_16"}
    former = step | {
        "grad_norm": {names[group]: norm for group, norm in step["grad_norm"].items()},
        "grad_norm_layers": {
            names[group]: list(norms.values()) for group, norms in step["grad_norm_layers"].items()
        },
    }
    assert as_now(former) == flat(step)
    assert as_now(strictly(to_json(step))) == strictly(to_json(step))


def test_losses_keep_every_digit():
    loss = 0.1 + 0.2
    assert f" loss={loss!r} " in to_text(record(totals(loss=loss)), 4)
    assert strictly(to_json(record(totals(loss=loss))))["loss"] == loss


def test_metrics_weigh_every_labelled_token_alike():
    step = record()
    assert step["loss"] == 0.32518
    assert step["acc"] == pytest.approx(0.86)
    assert step["loss_from_metric"] == pytest.approx(0.3)
    assert step["perplexity"] == pytest.approx(1.349859, abs=1e-6)  # e^0.3


def test_what_is_learned_and_what_is_padding():
    """Of 1,600,000 tokens 200,000 are padding, and of the others 1,000,000 have a label."""
    step = record()
    assert step["trained_token_share"] == pytest.approx(1_000_000 / 1_400_000)
    assert step["padding_share"] == 0.125
    assert " trained_token_share=0.71429 padding_share=0.125 " in to_text(step, 4)
    empty = record(totals(tokens=[0, 0, 0], padding=1_600_000))
    assert (empty["trained_token_share"], empty["padding_share"]) == (0.0, 1.0)


def test_expert_figures_are_shares_of_all_assignments():
    step = record()
    assert step["dropped_token_rate"] == pytest.approx(0.2)
    assert step["expert_load"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert to_text(step, 4).endswith(
        "dropped_token_rate=0.2 expert_load=[0.1000,0.2000,0.3000,0.4000] "
        "step_time=9.76 peak_memory=1073741824"
    )


@pytest.mark.parametrize("empty", [[], [0]])
def test_a_dense_model_has_no_expert_figures(empty):
    step = record(totals(assigned=empty, kept=empty))
    assert (step["dropped_token_rate"], step["expert_load"]) == (None, [])
    assert "dropped_token_rate=nan expert_load=[] " in to_text(step, 4)


def test_the_two_countings_of_flops_have_names_of_their_own():
    step = record(step_speed=speed(tflops=105.9, model_tflops=152.0, mfu=None))
    assert (step["tflops"], step["model_tflops"], step["mfu"]) == (105.9, 152.0, None)
    assert " model_tflops=152.0 mfu=nan " in to_text(step, 4)


def test_what_json_lacks_becomes_null():
    step = record(
        totals(loss=math.nan, tokens=[0, 0, 0], correct=[0, 0, 0], loss_sums=[0.0, 0.0, 0.0]),
        grad_norms={"default": math.inf, "fp32": math.nan, "experts": 1.0},
    )
    parsed = strictly(to_json(step))
    assert parsed["loss"] is parsed["loss/en"] is parsed["perplexity"] is None
    assert [parsed[f"grad_norm/{group}"] for group in ("default", "fp32", "experts")] == [None, None, 1.0]
    assert parsed["acc"] == 0.0
    text = to_text(step, 4)
    assert re.search(r" loss=nan .* grad_norm=\{'0_default': inf, '1_fp32': nan,", text)


def test_a_perplexity_beyond_a_float_is_infinite():
    assert perplexity(0.2737) == pytest.approx(1.3148, abs=1e-4)  # the benchmark's own pair
    assert perplexity(1e4) == math.inf
