"""``portmoe chat`` says what the library that others use says, from an export and from a checkpoint."""

import builtins
import json

import pytest
import torch
from click.testing import CliRunner
from layout_keys import FSDP

from portmoe.chat.model import opened
from portmoe.chat.source import find
from portmoe.cli.chat import _talk, chat
from portmoe.config.read import load_config
from portmoe.data.chat.messages import ASSISTANT, USER, Message
from portmoe.errors import ConfigError
from portmoe.generation.conversation import open_conversation, stream
from portmoe.generation.decode import Decoding, answers

transformers = pytest.importorskip("transformers")

ASKED = "What is the capital of France?"
SMALL = [
    *("data.seq_len=32", "data.micro_bsz=1", "data.global_batch_size=2", "data.num_samples=200"),
    *("data.total_steps=3", "model.vocab_size=768", "model.hidden_size=32", "model.intermediate_size=48"),
    *("adam.lr=0.002", "ckpt.checkpoint_every=2", "data.tokenizer=${configs}/conversations/tokenizer"),
    *("data.chat_template=mixtral", f'eval.prompts=["{ASKED}"]', "eval.every=3", "eval.max_tokens=12", FSDP),
]


def train(directory):
    from portmoe.training.run import train

    config = load_config("tiny_mixtral", [*SMALL, f"run.directory={directory}"])
    train(config, "tiny_mixtral", "cpu", "torchrun")


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A finished run of two ranks."""
    directory = tmp_path_factory.mktemp("chat") / "run"
    world(2).call(train, directory)
    return directory


def asked(source, *options, text=None):
    return CliRunner().invoke(
        chat, [str(source), "--backend", "cpu", "--max-tokens", "12", *options], input=text
    )


def test_the_export_says_in_transformers_what_it_says_here(trained):
    folder = trained / "hf_model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": ASKED}], add_generation_prompt=True, return_dict=False
    )
    source = find(trained)
    conversation = source.conversation()
    prompt = conversation.prompt([Message(USER, ASKED)])
    assert prompt == list(rendered)
    assert set(conversation.ends) == {tokenizer.eos_token_id} == {model.generation_config.eos_token_id}
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
    with opened(source, "cpu") as (next_logits, _):
        (found,) = answers(next_logits, [prompt], Decoding(12, conversation.ends))
    assert found == expected[0, len(prompt) :].tolist()
    lines = (trained / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    assert last["answer"].strip()
    assert (last["step"], last["answer"]) == (3, tokenizer.decode(found, skip_special_tokens=True))


def test_export_and_checkpoint_answer_alike_and_by_the_words_of_the_command(trained):
    answer = asked(trained, "--prompt", ASKED)
    assert answer.exit_code == 0
    assert answer.stdout.strip("\n")
    assert "hf_model, mixtral" in answer.stderr
    of_checkpoint = asked(trained, "--step", "3", "--prompt", ASKED)
    assert of_checkpoint.stdout == answer.stdout
    assert "after step 3" in of_checkpoint.stderr
    assert asked(trained, text=ASKED + "\n").stdout == answer.stdout
    both = asked(trained / "hf_model", "--prompt", ASKED, "--prompt", "Hello").stdout
    assert both.startswith(f"> {ASKED}\n{answer.stdout}> Hello\n")
    drawn = [asked(trained, "--prompt", ASKED, "--temperature", "5", "--seed", seed).stdout for seed in "778"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_mistakes(trained, tmp_path):
    for source, step, message in (
        (tmp_path, None, "is neither a run, which has a config.yaml, nor a folder of the hub"),
        (trained / "hf_model", 3, "--step 3 is for a run"),
        (trained, 7, "holds no checkpoint of step 7; there are 2, 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            find(source, step)
    (tmp_path / "config.yaml").write_text("model_type: mixtral\n")
    with pytest.raises(ConfigError, match="neither an hf_model nor a checkpoint"):
        find(tmp_path)
    assert "standard input is empty" in asked(trained, text=" ").stderr
    assert "--prompt is empty" in asked(trained, "--prompt", "").stderr


def test_turns_at_a_terminal(monkeypatch, capsys):
    said = iter(["one", "two", "", "/new", "three"])

    def typed(_):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", typed)
    seen = []

    def answer(turns):
        seen.append([turn.content for turn in turns])
        return Message(ASSISTANT, f"to {turns[-1].content}")

    _talk(answer, is_chat=True)
    assert seen == [["one"], ["one", "to one", "two"], ["three"]]


def test_text_comes_in_whole_characters():
    overrides = ["data.tokenizer=${configs}/conversations/tokenizer", "data.chat_template=chatml"]
    conversation = open_conversation(load_config("tiny_mixtral", overrides))
    told = []
    take = stream(conversation, told.append)
    text = "Paris, 上海 é!"
    tokens = conversation._tokenizer.encode(text)
    for token in tokens:
        take(token)
    assert "".join(told) == text
    assert len(tokens) > len([piece for piece in told if piece]) > 3
    assert not any("\ufffd" in piece for piece in told)


def test_what_ends_an_answer():
    """The end-of-text token, and what the template closes a turn with where that is a token of its own."""
    overrides = ["data.tokenizer=${configs}/conversations/tokenizer", "data.chat_template=mixtral"]
    conversation = open_conversation(load_config("tiny_mixtral", overrides))
    assert conversation.ends == {1}
    assert conversation.is_chat
