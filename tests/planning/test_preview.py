"""``portmoe data preview``: what is shown of data is what training will take."""

import json
import re
from html import unescape

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from portmoe.cli.main import run as portmoe

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}ask {{ m.content }} {% else %}{% generation %}"
    "{{ m.content }} end {% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.fixture
def command(tmp_path):
    """The command over forty conversations of one question and answer, two of another length, one without."""
    words = ["ask", "answer", "end", "\x1b[31m", "<b>", *map(str, range(40))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="ask"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["end"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "end", "chat_template": TEMPLATE})
    )
    told = [{"instruction": str(n), "output": "answer"} for n in range(37)]
    told += [{"instruction": "1 2 \x1b[31m <b>", "output": "answer answer answer"}] * 2
    told += [{"instruction": "1"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
    keys = {
        "train_folder": tmp_path / "mine.jsonl",
        "tokenizer": tmp_path,
        "cache_folder": tmp_path / "cache",
    }
    keys |= {"seq_len": 16, "packing": "whole", "global_batch_size": 2, "micro_bsz": 1, "num_epochs": 3}
    keys |= {"total_steps": "null"}
    settings = [part for key, value in keys.items() for part in ("--set", f"data.{key}={value}")]
    return ["data", "preview", "--config", "tiny_moe4", *settings]


def test_the_terminal(command, capsys):
    assert portmoe([*command, "--samples", "40"]) == 0
    told = capsys.readouterr().out
    assert "line 1 of " in told
    assert "ask 0⟦ answer end⟧" in told
    assert "ask 1 2 ␛[31m <b>⟦ answer answer answer end⟧" in told
    assert "\x1b" not in told
    assert re.search(r"data +39 samples, 166 tokens", told)  # 37 of 4 and 2 of 9
    assert re.search(r"learned +49.4% of the tokens", told)  # 2 · 37 + 4 · 2 of 166
    assert re.search(r"packing +whole: 11 rows of 16 tokens, 94.3% full, 0 samples divided", told)
    assert re.search(r"steps +5.5 an epoch on 1 rank, 17 in all", told)  # 33 rows, 2 a step
    assert re.search(r"\n +4 ▇+ 37\n(.*\n){4} +9 ▇+ 2\n", told)
    assert "1 of 40 records are left out" in told
    assert "line 40 of" in told
    assert "there is no 'output'" in told


def test_the_page(command, tmp_path, capsys):
    out = tmp_path / "pages" / "preview.html"
    assert portmoe([*command, "--samples", "40", "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    assert re.search(r"39 samples, 49.4% of their tokens are learned", page)
    assert "attention" in page
    assert "data.train_folder: 1 of 40 records are left out: see Problems." in page
    marks = [unescape(mark).strip() for mark in re.findall(r"<mark>(.*?)</mark>", page)]
    assert marks.count("answer end") == 37
    assert marks.count("answer answer answer end") == 2
    assert "line 40 of" in page
    assert 'class="column"' in page


def test_the_dummy_data_are_said(capsys):
    assert portmoe(["data", "preview", "--config", "tiny_moe4"]) == 2
    assert "data.train_folder is null" in capsys.readouterr().err
