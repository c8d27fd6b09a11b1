"""The packaged recipes of fine-tuning: published sizes and settings, and the tiny ones' conversations."""

import json

import pytest

from portmoe.cli import main as command
from portmoe.config.read import load_config
from portmoe.configs.conversations import make

RECIPES = {  # name → (sizes of, adam.lr, micro-batches, warm-up, tokens of a row, experts at a time)
    "deepseek_v2_chat_full_alpaca_e3": ("deepseek_v2", 1e-5, 1, 0.0, 2048, 20),
    "deepseek_v2_lite_chat_full_alpaca_e3": ("deepseek_v2_lite", 1e-5, 1, 0.0, 2048, 8),
    "deepseek_v2_lite_chat_full_alpaca_e3_32k_varlen": ("deepseek_v2_lite", 1e-5, 1, 0.0, 32768, 8),
    "mixtral_8x7b_instruct_full_oasst1_e3": ("mixtral_8x7b", 2e-5, 16, 0.03, 2048, None),
}
TINY = ("tiny_mixtral_chat_full_facts_e3", "tiny_deepseek_v2_chat_full_facts_e3")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_settings(name):
    sizes, lr, micro_num, warmup, seq_len, at_once = RECIPES[name]
    config = load_config(name)
    assert config.architecture == load_config(sizes).architecture
    adam, schedule, data = config.adam, config.lr_scheduler, config.data
    assert (adam.lr, adam.adam_beta1, adam.adam_beta2, adam.weight_decay) == (lr, 0.9, 0.999, 0.0)
    assert (schedule.warmup_ratio, schedule.eta_min) == (warmup, 0.0)
    assert config.hybrid_zero_optimizer.clip_grad_norm == 1.0
    assert (data.num_epochs, data.total_steps, data.micro_bsz, data.micro_num) == (3, None, 1, micro_num)
    assert (data.seq_len, data.packing, config.loss.reduction) == (seq_len, "cut", "token")
    assert (config.model.dtype, config.grad_scaler.fp16.initial_scale) == ("float16", 2**16)
    assert (config.ckpt.checkpoint_every, config.ckpt.keep, config.eval.every) == (50, 2, 25)
    assert config.model.checkpoint is True
    assert config.shards_parameters
    assert config.expert_shard == at_once


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_a_folder_and_a_file(name, tmp_path):
    sizes = load_config(name).model.model_dump()
    ours = ("from_pretrained", "checkpoint", "checkpoint_offload", "num_chunks", "dtype", "use_flash_attn")
    content = {key: value for key, value in sizes.items() if key not in ours}
    (tmp_path / "config.json").write_text(json.dumps(content | {"model_type": load_config(name).model_type}))
    given = [f"model.from_pretrained={tmp_path}", f"data.train_folder={tmp_path}/alpaca.json"]
    config = load_config(name, given)
    assert config.architecture == load_config(name).architecture
    assert config.data.train_folder.endswith("alpaca.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_takes(name, capsys):
    assert command.run(["train", "--config", name, "--dry-run", "--world-size", "64"]) == 0
    said = capsys.readouterr().out
    assert "layout           64 ranks: data 64" in said
    assert "together" in said


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_is_the_tiny_model_on_packaged_data(name):
    config, sizes = load_config(name), load_config(name.partition("_chat")[0])
    assert config.architecture.layers == sizes.architecture.layers
    assert config.data.num_epochs == 3
    held_out = {messages[0]["content"] for messages in _held_out(config)}
    assert set(config.eval.prompts) <= held_out
    settings = json.loads((make.HERE / make.TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    assert max(settings["model"]["vocab"].values()) < config.model.vocab_size
    taught = (make.HERE / make.SINGLE).read_text() + (make.HERE / make.DIALOGUES).read_text()
    assert not [asked for asked in held_out if f'{asked}"' in taught]


def _held_out(config):
    with open(config.data.valid_folder, encoding="utf-8") as file:
        return [json.loads(line)["messages"] for line in file]


def test_what_is_packaged_is_what_is_made():
    pytest.importorskip("tokenizers")
    for name, text in (make.files() | make.tokenizer_files()).items():
        assert (make.HERE / name).read_text(encoding="utf-8") == text, name
