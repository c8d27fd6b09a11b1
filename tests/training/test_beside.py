"""What an export carries over beside the weights, and what it says ends an answer."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from portmoe.config.read import load_config
from portmoe.configs.conversations.make import HERE, TOKENIZER
from portmoe.training.beside import KEPT, keep, kept_files, token_ids

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path):
    """A model's folder without its weights, whose tokenizer has a token that closes turns."""
    path = tmp_path / "model"
    shutil.copytree(HERE / TOKENIZER, path)
    fast = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    fast.add_special_tokens(["<|im_end|>"])
    fast.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text("{}")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.5}))
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (path / "model.safetensors").write_text("not copied")
    return path


def kept(folder, run, *overrides):
    config = load_config("tiny_mixtral", overrides)
    model = config.model.model_copy(update={"from_pretrained": str(folder)})
    tensor = SimpleNamespace(dtype=torch.bfloat16)
    run.mkdir()
    keep(config.model_copy(update={"model": model}), run, SimpleNamespace(path=folder, tensors={"w": tensor}))
    return kept_files(run)


def test_a_models_own_files_are_carried_over_unchanged(folder, tmp_path):
    files = kept(folder, tmp_path / "run")
    names = ("chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json")
    assert set(files) == {*names, "tokenizer_config.json", "dtypes.json"}
    for name in names:
        assert files[name].read_bytes() == (folder / name).read_bytes()


def test_another_template_comes_with_what_closes_its_turns(folder, tmp_path):
    files = kept(folder, tmp_path / "run", "data.chat_template=chatml")
    assert "im_start" in files["chat_template.jinja"].read_text()
    closing = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<|im_end|>")
    settings = json.loads(files["generation_config.json"].read_text())
    assert settings == {"bos_token_id": 0, "eos_token_id": [1, 7, closing], "temperature": 0.5}
    assert token_ids(tmp_path / "run") == {"bos_token_id": 0, "eos_token_id": [1, 7, closing]}


def test_another_tokenizer_takes_the_place_of_the_models(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(HERE / TOKENIZER, other)
    (folder / "vocab.json").write_text("{}")
    keys = (f"data.tokenizer={other}", "data.chat_template=mixtral")
    files = kept(folder, tmp_path / "run", *keys)
    assert files["tokenizer.json"].read_bytes() == (other / "tokenizer.json").read_bytes()
    assert "vocab.json" not in files
    assert "[INST]" in files["chat_template.jinja"].read_text()


def test_without_a_tokenizer_nothing_is_kept(tmp_path):
    keep(load_config("tiny_mixtral"), tmp_path, None)
    assert not Path(tmp_path / KEPT).exists()
    assert kept_files(tmp_path) == token_ids(tmp_path) == {}
