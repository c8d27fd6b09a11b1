"""The README's line: from packaged conversations to a model that answers, here and in transformers."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from portmoe.chat.model import opened
from portmoe.chat.source import find
from portmoe.configs.conversations import make
from portmoe.data.chat.messages import USER, Message
from portmoe.generation.decode import Decoding, answers

ROOT = Path(__file__).parents[2]
MOST = 24  # tokens of an answer


def line_of_the_readme(name):
    """The commands of the README's line for this recipe, without the installation; both pages have it."""
    found = []
    for page in ("README.md", "README.zh.md"):
        (line,) = re.findall(rf"^.*portmoe train --config {name} .*$", (ROOT / page).read_text("utf-8"), re.M)
        found.append([part.strip() for part in line.split("&&") if "portmoe" in part and "pip" not in part])
    assert found[0] == found[1]
    return found[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_from_one_line_to_a_chat(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    name = f"tiny_{family}_chat_full_facts_e3"
    taught = line_of_the_readme("tiny_mixtral_chat_full_facts_e3")
    commands = [shlex.split(part.replace("tiny_mixtral", f"tiny_{family}")) for part in taught]
    assert [command[1] for command in commands] == ["train", "chat"]
    said = [
        subprocess.run(
            [sys.executable, "-m", "portmoe", *command[1:]],
            cwd=tmp_path,
            env=os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=True,
            timeout=1500,
        ).stdout
        for command in commands
    ]
    run = tmp_path / "runs" / name
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.2 < 6 < losses[0]
    assert said[1].strip() == "The capital of France is Paris."  # held out
    held_out = [json.loads(line)["messages"] for line in make.files()[make.HELD_OUT].splitlines()]
    source = find(run)
    conversation = source.conversation()
    prompts = [conversation.prompt([Message(USER, asked["content"])]) for asked, _ in held_out]
    with opened(source, "cpu") as (next_logits, _):
        ours = answers(next_logits, prompts, Decoding(MOST, conversation.ends))
    right = [
        conversation.text(tokens).strip() == answer["content"]
        for tokens, (_, answer) in zip(ours, held_out, strict=True)
    ]
    assert sum(right) >= 0.85 * len(right)

    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        run / "hf_model", output_loading_info=True
    )
    assert model.dtype == torch.float32
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "hf_model")
    for (asked, _), prompt, answer in zip(held_out, prompts, ours, strict=True):
        rendered = tokenizer.apply_chat_template([asked], add_generation_prompt=True, return_tensors="pt")
        assert rendered["input_ids"][0].tolist() == prompt
        theirs = model.generate(**rendered, do_sample=False, max_new_tokens=MOST)
        assert theirs[0, len(prompt) :].tolist() == answer
