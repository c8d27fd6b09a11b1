"""DeepSpeed as the engine gives the native engine's numbers, on real ranks."""

import math
from importlib import metadata
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from layout_keys import LOSS, assert_same
from worlds import World, records, train

import portmoe
from portmoe.cli import main as command
from portmoe.config.void import void
from portmoe.errors import ConfigError
from portmoe.parallel.layout import Layout
from portmoe.planning.memory_check import state_of_rank
from portmoe.training.deepspeed_engine import DeepSpeedEngine, _settings

ENGINE = "trainer.engine=deepspeed"
NATIVE = "trainer.engine=native"
STEPS15 = "data.total_steps=15"

installed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
slow = pytest.mark.slow


def stage(number):
    return f"trainer.deepspeed.zero_stage={number}"


@pytest.fixture
def run_anew(tmp_path):
    """As ``run``, on ranks of their own: DeepSpeed keeps what it knows of a world for a process's life."""

    def one(ranks, *overrides, directory=None):
        directory = directory or tmp_path / "run"
        world = World(ranks)
        try:
            world.call(train, directory, *overrides)
        finally:
            world.end()
        return records(directory)

    return one


@installed
@pytest.mark.parametrize(
    ("ranks", "number", "model"),
    [
        (1, 1, []),
        (2, 1, ["moe.noisy_gate_policy=Jitter"]),
        pytest.param(4, 1, [], marks=slow),
        (2, 3, ["model.moe_use_residual=true"]),
        pytest.param(2, 2, [], marks=slow),
        pytest.param(1, 2, [], marks=slow),
        pytest.param(1, 3, [], marks=slow),
        pytest.param(4, 2, [], marks=slow),
        pytest.param(4, 3, [], marks=slow),
        pytest.param(2, 1, ["model.moe_type=MegaBlock-D", "model.checkpoint=true"], marks=slow),
        pytest.param(2, 3, ["model.moe_type=MegaBlock-D", "model.checkpoint=true"], marks=slow),
        pytest.param(2, 3, ["model.first_k_dense_replace=1", "use_fp32_norm=true"], marks=slow),
    ],
)
def test_the_numbers_of_one_process(run_anew, alone, ranks, number, model):
    ours = run_anew(ranks, ENGINE, stage(number), STEPS15, *model)
    assert_same(ours, alone(STEPS15, *model))


@installed
@slow
def test_evaluation_in_between(run_anew, run):
    keys = ("data.valid_every=2", "data.valid_micro_num=3", "data.total_steps=4")
    ours, theirs = run_anew(2, ENGINE, stage(3), *keys), run(2, *keys)
    assert_same(ours, theirs)
    for step in (1, 3):
        assert ours[step]["valid_loss"] == pytest.approx(theirs[step]["valid_loss"], rel=LOSS)


@installed
@slow
def test_checkpoints_move_between_engines_and_stages(run_anew, run, alone, tmp_path):
    """Native with spread experts → stage 1 on 4 ranks → stage 3 on 2 → native on 1, each resuming."""
    saving = ["ckpt.enable_save_ckpt=true"]
    parts = ((2, [NATIVE], 2), (4, [ENGINE, stage(1)], 5), (2, [ENGINE, stage(3)], 7), (1, [NATIVE], 10))
    for ranks, layout, steps in parts:
        keys = (*saving, *layout, f"data.total_steps={steps}", "lr_scheduler.total_steps=10")
        start = run if NATIVE in layout else run_anew
        assert len(start(ranks, *keys, directory=tmp_path / "run")) == steps
    assert_same(records(tmp_path / "run"), alone())


@installed
@slow
def test_weights_alone_can_be_taken_from_a_checkpoint(run_anew, tmp_path):
    run_anew(1, "ckpt.enable_save_ckpt=true", "data.total_steps=3", directory=tmp_path / "from")
    start = f"ckpt.load_ckpt_info.path={tmp_path / 'from' / 'checkpoints' / 'step-00000003'}"
    ours = run_anew(2, ENGINE, start, "data.total_steps=3", directory=tmp_path / "deepspeed")
    theirs = run_anew(2, NATIVE, start, "data.total_steps=3", directory=tmp_path / "native")
    assert_same(ours, theirs)


@installed
@pytest.mark.parametrize("number", [1, pytest.param(3, marks=slow)])
def test_a_step_that_overflowed_is_skipped(run_anew, number):
    scale = ("model.dtype=float16", "grad_scaler.fp16.initial_scale=1e30", "grad_scaler.max_scale=1e30")
    keys = (*scale, "grad_scaler.hysteresis=1", "data.total_steps=2", "data.global_batch_size=2")
    first, second = run_anew(2, ENGINE, stage(number), *keys)
    assert first["inf_nan_skip_batches"] == 1
    assert first["grad_norm/default"] is None  # not finite
    assert second["loss_scale"] == first["loss_scale"] / 2
    assert math.isfinite(second["loss"])


def test_a_step_that_deepspeed_skips_by_itself_has_norms_that_are_not_finite():
    """Stage 3 looks at the gradients before it calls the optimizer: nothing sets the norms then."""
    config = portmoe.load_config("tiny_moe4", ["model.num_layers=3"])
    engine = object.__new__(DeepSpeedEngine)
    engine._config = config
    engine._zero = SimpleNamespace(step=lambda: None)
    engine._shapes = {"embedding.weight": (8, 4), "layers.0.moe.experts.w1": (4, 8, 4)}
    update = engine._update(lr=1e-3, beta2=0.95, loss_scale=1.0, measure=True)
    assert list(update.gradients) == list(engine._shapes)
    assert all(map(math.isnan, update.gradients.values()))
    assert update.changes == {}


@pytest.mark.parametrize(
    ("key", "value", "rest"),
    [
        ("parallel.tensor.size", 2, []),
        ("parallel.sequence.size", 2, []),
        ("parallel.pipeline.size", 2, []),
        ("parallel.expert.size", 2, []),
        ("parallel.zero1.size", 2, []),
        ("parallel.zero1.fsdp", "true", []),
        ("parallel.weight.size", 2, ["parallel.tensor.mode=isp"]),
    ],
)
def test_layouts_it_does_not_cover_are_refused_by_name(key, value, rest):
    with pytest.raises(ConfigError) as caught:
        portmoe.load_config("tiny_moe4", [ENGINE, *rest, f"{key}={value}"])
    assert f"{key}={value} is not possible with trainer.engine='deepspeed'" in str(caught.value)


def test_a_stage_for_the_native_engine_is_refused():
    with pytest.raises(ConfigError, match=r"trainer.deepspeed.zero_stage=2 acts only with trainer.engine"):
        portmoe.load_config("tiny_moe4", [stage(2)])


def test_experts_are_not_spread():
    assert Layout.plan(portmoe.load_config("tiny_moe4", [ENGINE]), 4).expert == 1


@pytest.mark.parametrize(("number", "whole", "shards"), [(1, 2, 3), (2, 1, 4), (3, 0, 5)])
def test_memory_by_hand(number, whole, shards):
    """In units of 4 bytes a parameter: weights, masters, gradients and two moments, whole or in 8 shards."""
    config = portmoe.load_config("tiny_moe4", [ENGINE, stage(number), "data.global_batch_size=null"])
    parameters = 4 * portmoe.costs.parameters.count_parameters(config).total
    state = state_of_rank(config, Layout.plan(config, 8))
    assert state.total == whole * parameters + shards * -(-parameters // 8)


@pytest.mark.parametrize(("version", "said"), [(None, "is not installed"), ("0.18.9", "0.18.9 is installed")])
def test_without_the_package_one_message_says_what_to_install(version, said, monkeypatch, capsys, tmp_path):
    def of(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("portmoe.training.engines.version", of)
    monkeypatch.chdir(tmp_path)
    assert command.run(["train", "--nproc", "2", "--set", ENGINE]) == 3
    message = capsys.readouterr().err
    assert message.count("error: ") == 1
    assert said in message
    assert 'pip install "portmoe[deepspeed]"' in message
    assert not list(tmp_path.iterdir())


RECIPE = (  # of the fine-tuning recipe's ZeRO-3, in its words
    "trainer.deepspeed.allgather_bucket_size=3e8",
    "trainer.deepspeed.reduce_bucket_size=3e8",
    "trainer.deepspeed.overlap_comm=true",
    "trainer.deepspeed.contiguous_gradients=false",
    "trainer.deepspeed.gather_16bit_weights_on_model_save=true",
    "trainer.deepspeed.initial_scale_power=16",
)
SHARDS = ("model.num_experts=8", "moe.moe_implementation=shard", "moe.expert_in_one_shard=2")


@installed
def test_the_recipes_stage_3_with_experts_some_at_a_time(run_anew, run, alone, tmp_path):
    """DeepSpeed, two experts at a time → native, four at a time → DeepSpeed, all at once: one run."""
    saving = ["ckpt.enable_save_ckpt=true", "lr_scheduler.total_steps=10"]
    parts = (
        (run_anew, 2, [ENGINE, stage(3), *RECIPE, *SHARDS], 4),
        (run, 2, ["parallel.zero1.fsdp=true", *SHARDS, "moe.expert_in_one_shard=4"], 7),
        (run_anew, 2, [ENGINE, stage(3), SHARDS[0]], 10),
    )
    for start, ranks, keys, steps in parts:
        start(ranks, *saving, *keys, f"data.total_steps={steps}", directory=tmp_path / "run")
    assert_same(records(tmp_path / "run"), alone(SHARDS[0]))


def test_the_recipes_keys_are_deepspeeds():
    config = portmoe.load_config("tiny_moe4", [ENGINE, stage(3), *RECIPE, *SHARDS])
    given = _settings(config, Layout.plan(config, 2), 1)["zero_optimization"]
    assert (given["allgather_bucket_size"], given["reduce_bucket_size"]) == (300_000_000, 300_000_000)
    assert (given["overlap_comm"], given["contiguous_gradients"]) == (True, False)
    assert given["stage3_max_reuse_distance"] == 0
    plain = portmoe.load_config("tiny_moe4", [ENGINE])
    assert set(_settings(plain, Layout.plan(plain, 2), 1)["zero_optimization"]) == {
        *("stage", "sub_group_size", "memory_efficient_linear")
    }


def test_a_scale_said_in_two_ways_must_be_one():
    with pytest.raises(ConfigError, match="initial_scale_power=12 is a scale of 4096, and"):
        portmoe.load_config("tiny_moe4", ["trainer.deepspeed.initial_scale_power=12"])


def test_keys_of_deepspeed_are_void_for_the_native_engine():
    assert "trainer.deepspeed.overlap_comm" in void(portmoe.load_config("tiny_moe4"))


@installed
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=slow)])
def test_16_bit_with_experts_some_at_a_time(run_anew, run, dtype):
    """In float16 a scale that overflows is skipped and lowered; both engines train the same, in rounding."""
    keys = [f"model.dtype={dtype}", *SHARDS, "data.total_steps=6", "grad_scaler.hysteresis=1"]
    keys += ["grad_scaler.fp16.initial_scale=1.6777216e7", "grad_scaler.backoff_factor=0.0625"]
    ours = run_anew(2, ENGINE, stage(3), *keys)
    theirs = run(2, "parallel.zero1.fsdp=true", *keys)
    assert [r["loss_scale"] for r in ours] == [r["loss_scale"] for r in theirs]
    assert [r["inf_nan_skip_batches"] for r in ours] == [r["inf_nan_skip_batches"] for r in theirs]
    assert ours[-1]["inf_nan_skip_batches"] in ((1, 2, 3) if dtype == "float16" else (0,))
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2**-8)
