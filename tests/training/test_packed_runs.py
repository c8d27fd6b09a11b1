"""Runs of packed samples: the same numbers on any number of ranks, and none of them lost to a kill."""

import json
import random
import time
from collections import Counter

import numpy as np
import pytest
from run_portmoe import arguments, environment, losses, records
from run_portmoe import run as run_command
from token_folder import conversations, folder_of
from zygote import start_portmoe

from portmoe.config.read import load_config
from portmoe.data import open_data
from portmoe.errors import ConfigError
from portmoe.verify.evidence.verify import verify

MIXTRAL, DEEPSEEK = "tiny_mixtral", "tiny_deepseek_v2"
SEQ_LEN, BATCH = 32, 12
SAMPLES, HELD_OUT = conversations(90, SEQ_LEN, 448, seed=1), conversations(61, SEQ_LEN, 448, seed=2)
SMALL = [
    *(f"data.seq_len={SEQ_LEN}", "data.micro_bsz=1", f"data.global_batch_size={BATCH}", "data.packing=whole"),
    *("data.total_steps=null", "data.num_epochs=2", "data.min_length=0", "data.valid_every=3"),
    *("model.vocab_size=448", "model.hidden_size=32", "model.num_hidden_layers=2"),
    *("model.intermediate_size=48", "moe.aux_loss=none", "ckpt.enable_save_ckpt=false"),
]
FIGURES = ("loss", "loss_from_metric", "grad_norm/default", "grad_norm/experts", "valid_loss", "valid_acc")
EXACT = ("data_crc32", "tokens/en", "valid_tokens", "padding_share", "trained_token_share", "largest_length")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    train, valid = folder_of(path / "train", SAMPLES), folder_of(path / "valid", HELD_OUT)
    return [f"data.train_folder={train}", f"data.valid_folder={valid}"]


def trained(directory, overrides, family=MIXTRAL):
    """One rank's part of a run."""
    from portmoe.training.run import train

    train(load_config(family, [*overrides, f"run.directory={directory}"]), "tiny", "cpu", "torchrun")


@pytest.fixture(scope="module")
def run(world, folders, tmp_path_factory):
    """``run(ranks, *overrides)``: the records, and the directory."""

    def of(ranks, *overrides, directory=None, family=MIXTRAL):
        directory = directory or tmp_path_factory.mktemp("packed") / "run"
        world(ranks).call(trained, directory, [*SMALL, *folders, *overrides], family)
        return records(directory), directory

    return of


@pytest.fixture(scope="module")
def alone(run):
    return run(1)


def best_fit(samples):
    """The number of rows, by looking at all of them for each sample, the longest first."""
    room = []
    for length in sorted(map(len, samples), reverse=True):
        fitting = [left for left in room if left >= length]
        room.append((room.pop(room.index(min(fitting))) if fitting else SEQ_LEN) - length)
    return len(room)


def labels_of(samples):
    """How many tokens are learned: those above 0 that follow another of their sample."""
    return sum(token > 0 for sample in samples for token in sample[1:])


def test_two_epochs_learn_every_label_twice(alone):
    metrics, directory = alone
    tokens = sum(map(len, SAMPLES))
    assert sum(record["tokens/en"] for record in metrics) == 2 * labels_of(SAMPLES)
    rows = best_fit(SAMPLES)
    assert len(metrics) == -(-2 * rows // BATCH)
    padding = sum(record["padding_share"] for record in metrics) * BATCH * SEQ_LEN
    assert round(padding) == len(metrics) * BATCH * SEQ_LEN - 2 * tokens
    for record in metrics:
        real = round((1 - record["padding_share"]) * BATCH * SEQ_LEN)
        assert record["trained_token_share"] == pytest.approx(record["tokens/en"] / real)
    assert {record["num_consumed_tokens"] for record in metrics[-1:]} == {len(metrics) * BATCH * SEQ_LEN}
    log = (directory / "train.log").read_text()
    assert f"90 samples, {tokens:,} tokens in {rows} rows of 32" in log
    assert f"{rows / BATCH:.4g} steps an epoch, {len(metrics)} in all" in log
    config = load_config(directory / "config.yaml")
    assert (config.data.total_steps, config.data.num_epochs) == (len(metrics), 2)
    assert metrics[-1]["lr_next"] == pytest.approx(config.lr_scheduler.eta_min)  # the cosine knows the end


def test_the_whole_validation_set_is_measured(alone):
    metrics, _ = alone
    found = [record["valid_tokens"] for record in metrics if "valid_tokens" in record]
    assert found == [labels_of(HELD_OUT)] * (len(metrics) // 3)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["data.valid_micro_num=2"]),
        (3, []),
        (4, ["data.valid_micro_num=5", "parallel.zero1.fsdp=true"]),
        pytest.param(
            4,
            ["parallel.pipeline.size=2", "parallel.tensor.size=2", "parallel.tensor.mode=msp"],
            marks=pytest.mark.slow,
        ),
        pytest.param(4, ["parallel.sequence.size=2", "parallel.zero1.fsdp=true"], marks=pytest.mark.slow),
    ],
)
def test_the_numbers_of_one_process_on_any_number_of_ranks(ranks, overrides, run, alone):
    """Micro-batches with different numbers of labels, spread by cost; a validation set that fills no pass."""
    found, expected = run(ranks, *overrides)[0], alone[0]
    assert len(found) == len(expected)
    assert len({record["tokens/en"] for record in expected}) > 1
    for ours, theirs in zip(found, expected, strict=True):
        assert [ours.get(key) for key in EXACT] == [theirs.get(key) for key in EXACT]
        for key in FIGURES:
            assert (key in ours) == (key in theirs)
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-6), key


def test_wider_micro_batches_have_the_same_labels_and_loss(run, alone):
    """The loss is a mean over the labels of the step, however they lie in micro-batches."""
    found, expected = run(2, "data.micro_bsz=3", "data.num_epochs=1", "adam.lr=2e-3")[0], alone[0]
    for ours, theirs in list(zip(found, expected, strict=False))[:3]:
        assert ours["tokens/en"] == theirs["tokens/en"]
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert found[0]["grad_norm/default"] == pytest.approx(expected[0]["grad_norm/default"], rel=1e-5)


def test_a_step_of_samples_packed_is_that_of_samples_one_by_one(run):
    """With an auxiliary loss for each sample and the routers' z-loss: the same loss, gradients and both."""
    of_samples = [
        *("data.valid_every=0", "data.num_epochs=1", "moe.aux_loss=model", "model.aux_loss_alpha=0.1"),
        *("model.moe_intermediate_size=16", "model.kv_lora_rank=10", "loss.z_loss_coeff=0.01"),
    ]
    rows = best_fit(SAMPLES)
    found = [
        run(1, *of_samples, f"data.packing={packing}", f"data.global_batch_size={batch}", family=DEEPSEEK)[0]
        for packing, batch in (("whole", rows), ("none", len(SAMPLES)))
    ]
    (packed,), (one_by_one,) = found
    assert packed["tokens/en"] == one_by_one["tokens/en"]
    assert packed["padding_share"] < 0.1 < one_by_one["padding_share"]
    for key in ("loss", "moe_loss", *(key for key in packed if key.startswith("grad_norm/"))):
        assert packed[key] == pytest.approx(one_by_one[key], rel=2e-6), key
        assert packed[key] > 0


def test_each_epoch_of_a_stream_has_every_sample_once(folders):
    """Read as a rank reads them, on three ranks: the tokens of 2.5 epochs, counted sample by sample."""
    overrides = [*SMALL, *folders, "data.num_epochs=null", "data.total_steps=99"]
    for packing in ("whole", "cut", "none"):
        config = load_config("tiny_mixtral", [*overrides, f"data.packing={packing}"])
        streams = [open_data(config, rank=rank, size=3, micro_num=4) for rank in range(3)]
        rows = streams[0].packs.num_rows
        by_index = {}
        for step in range(-(-5 * rows // (2 * BATCH))):
            for stream in streams:
                by_index |= {batch.index: batch for batch in stream.batches(step)}
        for stream in streams:
            stream.close()
        text = Counter(token for sample in SAMPLES for token in map(abs, sample))
        for epoch in range(2):
            read = Counter()
            for index in range(epoch * rows, (epoch + 1) * rows):
                batch = by_index[index]
                read.update(batch.tokens_T[: batch.segments.real].tolist())
            assert read == text


def test_keep_best(run, tmp_path):
    """A rate that soon spoils the weights: the lowest validation loss is early, and its checkpoint stays."""
    saving = ["ckpt.enable_save_ckpt=true", "ckpt.checkpoint_every=2", "ckpt.keep=2", "ckpt.keep_best=true"]
    spoiling = ["adam.lr=0.5", "lr_scheduler.warmup_ratio=0.5", "data.valid_every=1"]
    metrics, directory = run(1, *saving, *spoiling)
    judged = {record["step"] + 1: record["valid_loss"] for record in metrics if "valid_loss" in record}
    best = min(judged, key=judged.get)
    assert 1 <= best < len(metrics) - 2  # else nothing is shown
    kept = sorted(int(entry.name[5:]) for entry in (directory / "checkpoints").glob("step-*"))
    newest = [step for step in range(1, len(metrics) + 1) if step % 2 == 0 or step == len(metrics)][-2:]
    assert kept == [best, *newest]
    newest = json.loads((directory / "checkpoints" / f"step-{kept[-1]:08d}" / "state.json").read_text())
    progress = newest["state"]["progress"]
    assert (progress["best_step"], progress["best_loss"]) == (best, judged[best])
    said = f"step-{best:08d}, the lowest validation loss so far: {judged[best]:.6g}"
    assert said in (directory / "train.log").read_text()

    from portmoe.training.hub import export_run

    assert export_run(directory, "best", directory / "best", None) == best
    assert export_run(directory, None, directory / "newest", None) == kept[-1]
    hidden = (directory / "checkpoints" / f"step-{best:08d}").rename(tmp_path / "hidden")
    found = verify(directory).results  # and the tokens of the steps, drawn again, are right
    assert [result.subject for result in found if result.status == "fail"] == [f"checkpoints/step-{best:08d}"]
    assert ("batch", "pass") in [(result.subject, result.status) for result in found]
    hidden.rename(directory / "checkpoints" / f"step-{best:08d}")

    run(1, *saving, *spoiling, "data.num_epochs=3", directory=directory)  # goes on, and knows it still
    kept = sorted(int(entry.name[5:]) for entry in (directory / "checkpoints").glob("step-*"))
    assert (kept[0], len(kept)) == (best, 3)
    assert kept[-1] > len(metrics)
    passed = len(metrics) * BATCH - 2 * best_fit(SAMPLES)
    assert passed > 0  # else nothing is shown
    said = f"the last step of 2 epochs left room for {passed} rows, which the next epoch does not take"
    assert said in (directory / "train.log").read_text()

    state = directory / "checkpoints" / f"step-{kept[-1]:08d}" / "state.json"
    state.write_text(state.read_text().replace('"best_step"', '"other"'))
    with pytest.raises(ConfigError, match=r"no best one: train with ckpt\.keep_best"):
        export_run(directory, "best", directory / "none", None)


SAVING = {"ckpt__enable_save_ckpt": True, "ckpt__checkpoint_every": 3, "data__num_epochs": 2}


@pytest.fixture(scope="module")
def settings(folders):
    """Of a run of the benchmark's model on packed samples."""
    train = folders[0].partition("=")[2]
    own = {"data__train_folder": train, "data__min_length": 0, "data__total_steps": None}
    return SAVING | own | {"data__global_batch_size": 6, "data__micro_bsz": 1}


@pytest.mark.parametrize(
    ("packing", "kills", "seed"),
    [
        ("whole", 1, 0),
        *(pytest.param(packing, 10, 2, marks=pytest.mark.slow) for packing in ("whole", "cut")),
    ],
)
def test_killed_at_random_and_gone_on_with(packing, kills, seed, settings, tmp_path):
    """Every step has the tokens it has without a kill, in the same order, and the same loss to the bit."""
    settings = settings | {"data__packing": packing, "data__global_batch_size": 6 if kills == 1 else 2}
    whole = run_command(tmp_path / "whole", **settings)
    directory, rng = tmp_path / "run", random.Random(seed)
    for number in range(kills):
        process = start_portmoe(arguments(directory, **settings), environment())
        if number % 3 == 2:  # while it starts, packs and resumes
            time.sleep(rng.random() * 2)
        else:
            upto = rng.randint(len(whole) * number // kills + 1, len(whole) * (number + 1) // kills - 1)
            while process.poll() is None and len(records(directory)) < upto:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
    found = run_command(directory, **settings)
    assert [record["step"] for record in found] == list(range(len(whole)))
    assert [record["data_crc32"] for record in found] == [record["data_crc32"] for record in whole]
    assert losses(found) == losses(whole)


def test_a_run_gone_on_with_on_other_ranks_takes_the_same_samples(settings, tmp_path, world, folders):
    """Half on one rank, half on two: the set of a step is its own, whoever takes which."""
    overrides = [*SMALL, *folders, "ckpt.enable_save_ckpt=true", "data.valid_every=0"]
    world(1).call(trained, tmp_path / "whole", overrides)
    expected = records(tmp_path / "whole")
    half = len(expected) // 2
    schedule = f"lr_scheduler.total_steps={len(expected)}"
    shorter = ["data.num_epochs=null", f"data.total_steps={half}", schedule]
    world(1).call(trained, tmp_path / "run", [*overrides, *shorter])
    world(2).call(trained, tmp_path / "run", [*overrides, schedule])
    found = records(tmp_path / "run")
    assert [record["data_crc32"] for record in found] == [record["data_crc32"] for record in expected]
    assert np.allclose(losses(found), losses(expected), rtol=1e-6)
