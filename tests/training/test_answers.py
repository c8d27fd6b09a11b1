"""Prompts that are answered while a run goes on: the same in every layout, and nothing to the training."""

import json

import pytest
from layout_keys import FSDP, ISP, MSP, NO_EP, PP2, TP2
from worlds import World, records

from portmoe.config.read import PACKAGE, load_config
from portmoe.record.answers import ANSWERS, Answer
from portmoe.record.writers import Writers

FAMILY = "tiny_deepseek_v2"
SMALL = [
    *("data.seq_len=32", "data.micro_bsz=1", "data.global_batch_size=4", "data.num_samples=200"),
    *("data.total_steps=3", "model.vocab_size=768", "model.hidden_size=32", "model.num_hidden_layers=2"),
    *("model.q_lora_rank=12", "model.kv_lora_rank=10", "model.moe_intermediate_size=16"),
    *("ckpt.enable_save_ckpt=false", "ckpt.export_every=0", "adam.lr=0.02", "model.initializer_range=0.3"),
]
ASKED = [
    "data.tokenizer=${configs}/conversations/tokenizer",
    "data.chat_template=deepseek_v2",
    'eval.prompts=["What is the capital of France?", Hello]',
    "eval.every=2",
    "eval.max_tokens=6",
]
TIMES = {"step_time", "fwd_bwd_time", "bwd_time", "timestamp", "peak_memory", "tflops", "model_tflops"}


def train(directory, overrides):
    from portmoe.training.run import train

    train(load_config(FAMILY, [*overrides, f"run.directory={directory}"]), FAMILY, "cpu", "torchrun")


def numbers(directory):
    """What training computed: every column but those of time and memory."""
    return [
        {key: value for key, value in record.items() if key not in TIMES and "tgs" not in key}
        for record in records(directory)
    ]


def answers(directory):
    return [json.loads(line) for line in (directory / ANSWERS).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone") / "run"
    world(1).call(train, directory, [*SMALL, *ASKED])
    return answers(directory)


def test_what_is_recorded(alone):
    assert [(answer["step"], answer["prompt"]) for answer in alone] == [
        (step, prompt) for step in (0, 2, 3) for prompt in ("What is the capital of France?", "Hello")
    ]
    for answer in alone:
        assert 1 <= answer["tokens"] <= 6
        assert answer["ended"] or answer["tokens"] == 6
    texts = [answer["answer"] for answer in alone]
    assert texts[:2] != texts[4:]  # the weights have moved


LAYOUTS = {
    "fsdp, experts spread": (2, [FSDP]),
    "mtp": (2, [TP2]),
    "msp": (2, [TP2, MSP]),
    "isp": (2, [TP2, ISP]),
    "a ring": (2, ["parallel.sequence.size=2"]),
    "fsdp, experts some at a time": (
        2,
        [FSDP, NO_EP, "moe.moe_implementation=shard", "moe.expert_in_one_shard=4"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_answers_alike(layout, alone, world, tmp_path):
    ranks, keys = LAYOUTS[layout]
    world(ranks).call(train, tmp_path / "run", [*SMALL, *ASKED, *keys])
    assert answers(tmp_path / "run") == alone
    assert "  > Hello" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_answers_alike(stage, alone, tmp_path):
    pytest.importorskip("deepspeed")
    keys = ["trainer.engine=deepspeed", f"trainer.deepspeed.zero_stage={stage}", "parallel.expert.size=1"]
    world = World(2)  # DeepSpeed keeps what it knows of a world for a process's life
    try:
        world.call(train, tmp_path / "run", [*SMALL, *ASKED, *keys])
    finally:
        world.end()
    assert answers(tmp_path / "run") == alone


def test_training_computes_the_same_bits(alone, world, tmp_path):
    """Also with a capacity, which does not hold for answers."""
    small = [*SMALL, FSDP, "moe.capacity_factor=0.1", "moe.min_capacity=2"]
    world(2).call(train, tmp_path / "asked", [*small, *ASKED])
    world(2).call(train, tmp_path / "silent", small)
    assert numbers(tmp_path / "asked") == numbers(tmp_path / "silent")
    assert len(numbers(tmp_path / "asked")) == 3
    assert numbers(tmp_path / "asked")[-1]["dropped_token_rate"] > 0
    assert answers(tmp_path / "asked")[:2] == alone[:2]  # before the first step
    assert not (tmp_path / "silent" / ANSWERS).exists()


def test_a_pipeline_says_that_it_does_not_answer(world, tmp_path):
    world(2).call(train, tmp_path / "run", [*SMALL, *ASKED, PP2, "data.total_steps=1"])
    said = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert f"by `portmoe chat {tmp_path / 'run'}`" in said
    assert not (tmp_path / "run" / ANSWERS).exists()


def test_a_run_that_goes_on_has_each_answer_once(tmp_path):
    def writers(first_step):
        return Writers(tmp_path, 10, 1, first_step=first_step)

    answer = Answer("Hello", "Hi.\nThere.", 3, ended=False)
    before, after = writers(0), None
    for step in (0, 2, 4):
        before.answers(step, [answer])
    before.close()
    after = writers(2)
    after.close()
    assert [found["step"] for found in answers(tmp_path)] == [0, 2]
    lines = [line.partition(" ")[2] for line in (tmp_path / "train.log").read_text().splitlines()[:4]]
    assert lines == ["answers after 0 steps:", "  > Hello", "    Hi.", "    There. …"]


def test_packaged_places_are_found():
    tokenizer = load_config(FAMILY, ASKED).data.tokenizer
    assert tokenizer.endswith("configs/conversations/tokenizer")
    assert PACKAGE not in tokenizer
