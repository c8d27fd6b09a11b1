"""A pipeline evaluates, resumes, skips steps and waits no longer than said. Its numbers: ``test_layouts``."""

import itertools
import math

import pytest
from layout_keys import CHUNKS2, LAYERS4, LOSS, OVERLAP, PP2, PP4, assert_same
from worlds import MODEL, train

import portmoe
from portmoe.parallel.layout import Layout
from portmoe.parallel.stages import bubble, in_flight
from portmoe.training.engine import NativeEngine


@pytest.mark.parametrize("layout", [[PP2], pytest.param([PP2, CHUNKS2], marks=pytest.mark.slow)])
def test_evaluation_with_micro_batches_of_its_own(run, alone, layout):
    # 3 micro-batches in evaluation and 8 in training
    model = [*LAYERS4, "data.valid_every=2", "data.valid_micro_num=3", "data.total_steps=4"]
    ours, theirs = run(2, *layout, *model), alone(*model)
    assert_same(ours, theirs)
    for step in (1, 3):
        assert ours[step]["valid_loss"] == pytest.approx(theirs[step]["valid_loss"], rel=LOSS)


def test_checkpoints_move_into_a_pipeline_and_out_of_it(run, alone, tmp_path):
    """One process → interleaved stages → 4 data-parallel ranks → a pipeline, each resuming the one before."""
    saving = ["ckpt.enable_save_ckpt=true", *LAYERS4]
    for ranks, layout, steps in ((1, [], 3), (2, [PP2, CHUNKS2], 5), (4, [], 7), (2, [PP2], 10)):
        keys = (*saving, *layout, f"data.total_steps={steps}", "lr_scheduler.total_steps=10")
        records = run(ranks, *keys, directory=tmp_path / "run")
        assert len(records) == steps
    assert_same(records, alone(*LAYERS4))


def test_all_stages_skip_a_step_that_overflowed(run):
    scale = ("model.dtype=float16", "grad_scaler.fp16.initial_scale=1e30", "grad_scaler.max_scale=1e30")
    first, second = run(2, PP2, *scale, "grad_scaler.hysteresis=1", "data.total_steps=2")
    assert first["inf_nan_skip_batches"] == 1
    assert first["grad_norm/default"] is None  # not finite
    assert second["loss_scale"] == first["loss_scale"] / 2
    assert math.isfinite(second["loss"])


def ordered(directory, *overrides) -> list[tuple[str, int, int]]:
    """The (pass, stage, micro-batch) of a step in the order this rank did them."""
    order, original = [], NativeEngine.train_step

    def recorded(kind, stage):
        inner = getattr(stage, f"{kind}_one_chunk")

        def call(number, *args, **kwargs):
            order.append((kind, stage.stage_index, number))
            return inner(number, *args, **kwargs)

        setattr(stage, f"{kind}_one_chunk", call)

    def train_step(engine, *args, **keywords):
        schedule = engine._pipeline._training
        for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
            recorded("forward", stage)
            recorded("backward", stage)
        return original(engine, *args, **keywords)

    NativeEngine.train_step = train_step
    try:
        train(directory, *overrides, "data.total_steps=1")
    finally:
        NativeEngine.train_step = original
    return order


def idle_share(orders: list[list[tuple[str, int, int]]]) -> float:
    """Share of the ranks' time spent waiting: forward passes take 1 unit, backward passes 2, messages 0."""
    lengths = {"forward": 1, "backward": 2}
    last = max(stage for order in orders for _, stage, _ in order)
    waiting = [list(order) for order in orders]
    clock, ended = [0.0] * len(orders), {}
    while any(waiting):
        progress = False
        for rank, order in enumerate(waiting):
            while order:
                kind, stage, number = order[0]
                if kind == "forward":
                    needed = ("forward", stage - 1, number) if stage else None
                else:
                    needed = ("backward", stage + 1, number) if stage < last else ("forward", stage, number)
                if needed is not None and needed not in ended:
                    break
                clock[rank] = max(clock[rank], ended.get(needed, 0.0)) + lengths[kind]
                ended[order.pop(0)] = clock[rank]
                progress = True
        assert progress, "the order of operations is a deadlock"
    return 1 - 3 * len(ended) / 2 / (len(orders) * max(clock))


@pytest.mark.parametrize(
    ("ranks", "layout", "chunks", "micro_num"),
    [
        (2, [PP2], 1, 8),
        (4, [PP4], 1, 8),
        (4, [PP4], 1, 4),
        (2, [PP2, CHUNKS2], 2, 8),
        (2, [PP2, CHUNKS2, OVERLAP], 2, 3),  # rounds of 3, more than there are ranks
        (4, [PP4, CHUNKS2, "model.num_layers=8"], 2, 8),
    ],
)
def test_the_bubble_is_that_of_the_operations_really_done(world, tmp_path, ranks, layout, chunks, micro_num):
    keys = (*LAYERS4, f"data.global_batch_size={micro_num}", *layout)
    orders = world(ranks).call(ordered, tmp_path / "run", *keys)
    assert {len(order) for order in orders} == {2 * chunks * micro_num}
    layout = Layout.plan(portmoe.load_config("tiny_moe4", (*MODEL, *keys)), ranks)
    for rank, order in enumerate(orders):
        held = itertools.accumulate(1 if kind == "forward" else -1 for kind, _, _ in order)
        assert max(held) == in_flight(layout, chunks, rank)
    assert bubble(layout, chunks) == (ranks - 1) / (chunks * micro_num + ranks - 1)
    assert idle_share(orders) == pytest.approx((ranks - 1) / (chunks * micro_num + ranks - 1))
