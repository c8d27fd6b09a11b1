"""``portmoe config import``: XTuner's configs become ours, what is left out is told, and no code runs."""

import json
from pathlib import Path

import pytest

import portmoe
from portmoe.cli import main as command
from portmoe.config.importers import import_config
from portmoe.config.keys import walk
from portmoe.config.section import ModelSection
from portmoe.costs.parameters import count_parameters
from portmoe.errors import ConfigError
from portmoe.parallel.layout import Layout

FOLDER = Path(__file__).parent / "xtuner"
DEEPSEEK, MIXTRAL = FOLDER / "deepseek_v2_full.py", FOLDER / "mixtral_full.py"


@pytest.fixture
def edited(tmp_path):
    """``edited(file, old, new)`` is the path of the file with a text in place of another."""

    def write(file, *pairs):
        text = file.read_text()
        for old, new in zip(pairs[::2], pairs[1::2], strict=True):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tmp_path / "theirs.py").write_text(text)
        return tmp_path / "theirs.py"

    return write


def left_out(imported):
    return {item.key: item for item in imported.left_out}


def exists(key):
    """Whether a key of ours, which other work adds, is there."""
    return any(entry.path == key for entry in walk(portmoe.load_config("tiny_moe4")))


def test_deepseek_v2():
    imported = import_config(DEEPSEEK)
    config = imported.config
    assert count_parameters(config).total == 235_741_434_880
    assert config.model_type == "deepseek_v2"
    assert (config.model.dtype, config.model.checkpoint) == ("float16", True)
    assert (config.moe.moe_implementation, config.moe.expert_in_one_shard) == ("shard", 20)
    assert config.expert_shard == 20  # with parameters sharded
    assert (config.data.seq_len, config.data.micro_bsz, config.data.micro_num) == (2048, 1, 1)
    assert (config.data.packing, config.data.use_varlen_attn) == ("cut", False)
    assert (config.data.num_epochs, config.data.total_steps) == (3, None)
    assert (config.data.format, config.data.chat_template) == ("alpaca", "deepseek_v2")
    adam = config.adam
    assert (adam.lr, adam.adam_beta1, adam.adam_beta2, adam.weight_decay) == (1e-5, 0.9, 0.999, 0.0)
    assert config.hybrid_zero_optimizer.clip_grad_norm == 1.0
    # warmup_ratio is set there and used by no schedule
    assert (config.lr_scheduler.warmup_ratio, config.lr_scheduler.eta_min) == (0.0, 0.0)
    assert (config.ckpt.enable_save_ckpt, config.ckpt.checkpoint_every, config.ckpt.keep) == (True, 50, 2)
    assert not exists("ckpt.save_optimizer") or config.ckpt.save_optimizer is False
    assert imported.program == "XTuner"
    assert not imported.model_may_differ
    assert any("--deepspeed deepspeed_zero3" in note for note in imported.notes)
    assert any("model.from_pretrained" in note for note in imported.notes)


def test_a_split_sequence(edited):
    """Their files multiply the accumulation by it: so many fewer ranks see different samples."""
    assert import_config(DEEPSEEK).config.parallel.sequence.size == 1
    config = import_config(edited(DEEPSEEK, "parallel_size = 1", "parallel_size = 4")).config
    assert (config.parallel.sequence.size, config.data.micro_num) == (4, 4)
    assert Layout.plan(config, 128).tokens_per_step == 128 * 2048  # as many as there without


def test_what_their_data_sets_do_unless_told():
    """Samples of their own rows, and with varlen attention where it is asked for."""
    assert import_config(MIXTRAL).config.data.packing == "cut"
    assert import_config(MIXTRAL).config.data.use_varlen_attn is False


def test_samples_that_are_not_packed(edited):
    config = import_config(edited(DEEPSEEK, "pack = True", "pack = False", "attn = False", "attn = True"))
    assert (config.config.data.packing, config.config.data.use_varlen_attn) == ("none", True)
    unsaid = edited(MIXTRAL, ", pack_to_max_length=True", "")
    assert import_config(unsaid).config.data.packing == "none"


def test_data_of_ones_own_in_their_format(edited):
    theirs = edited(
        *(DEEPSEEK, 'path="tatsu-lab/alpaca"', 'path="json", data_files=dict(train="mine.jsonl")'),
        *(
            "dataset_map_fn=alpaca_map_fn",
            "dataset_map_fn=None",
            "PROMPT_TEMPLATE.deepseek_v2",
            "PROMPT_TEMPLATE.x",
        ),
    )
    imported = import_config(theirs)
    data = imported.config.data
    assert (data.train_folder, data.format, data.chat_template) == ("mine.jsonl", "xtuner", "tokenizer")
    assert (
        "knows deepseek_v2, mixtral"
        in left_out(imported)["train_dataloader.dataset.template_map_fn.template"].why
    )


def test_mixtral():
    config = import_config(MIXTRAL).config
    assert (config.model_type, count_parameters(config).total) == ("mixtral", 46_702_792_704)
    assert (config.data.seq_len, config.data.micro_bsz, config.data.micro_num) == (4096, 2, 16)
    assert (config.lr_scheduler.warmup_ratio, config.lr_scheduler.eta_min) == (pytest.approx(0.05), 1e-6)
    assert (config.adam.lr, config.adam.adam_beta2) == (2e-5, 0.98)
    assert (config.model.dtype, config.run.seed) == ("bfloat16", 7)
    assert config.grad_scaler.fp16.initial_scale == 1024
    assert config.grad_scaler.fp16.growth_interval == 500
    assert config.hybrid_zero_optimizer.clip_grad_norm == 0.0  # none is asked for there


def test_what_is_not_carried_over_is_told_with_its_line_and_reason():
    lines = DEEPSEEK.read_text().splitlines()
    found = left_out(import_config(DEEPSEEK))
    names = ["model.llm.pretrained_model_name_or_path", "train_dataloader.dataset.dataset.path", "code"]
    names += ["custom_hooks.EvaluateChatHook.system"]
    assert set(names) <= set(found)
    for name in names:
        assert found[name].why
    assert lines[found["code"].line - 1] == "if use_varlen_attn:"
    assert "path=" in lines[found["train_dataloader.dataset.dataset.path"].line - 1]
    assert not [key for key in found if key.startswith(("tokenizer", "env_cfg", "visualizer"))]
    found = left_out(import_config(MIXTRAL))
    assert "read_base" in found["code"].value
    assert "set ckpt.keep" in found["default_hooks.checkpoint.max_keep_ckpts"].why
    assert "begins at zero" in found["param_scheduler.LinearLR.start_factor"].why


def test_keys_that_portmoe_does_not_have_yet_are_told():
    found = left_out(import_config(DEEPSEEK))
    for theirs, ours in {
        "train_cfg.max_epochs": "data.num_epochs",
        "custom_hooks.EvaluateChatHook.every_n_iters": "eval.every",
        "train_dataloader.dataset.dataset_map_fn": "data.format",
    }.items():
        assert (theirs in found) != exists(ours), theirs


def test_the_result_is_a_config_file(tmp_path, capsys):
    target = tmp_path / "ours.yaml"
    assert command.run(["config", "import", str(DEEPSEEK), "-o", str(target)]) == 0
    told = capsys.readouterr().err
    assert "XTuner's defaults hold" in told
    assert portmoe.load_config(target) == import_config(DEEPSEEK).config
    assert "# Not carried over:" in target.read_text()


def test_a_folder_gives_the_model_by_itself(edited, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    sizes = portmoe.load_config("tiny_mixtral").model.model_dump()
    sizes = {key: value for key, value in sizes.items() if key not in ModelSection.model_fields}
    sizes |= {"model_type": "mixtral"}
    (folder / "config.json").write_text(json.dumps(sizes))
    imported = import_config(edited(MIXTRAL, "mistralai/Mixtral-8x7B-v0.1", str(folder)))
    assert imported.tree["model"]["from_pretrained"] == str(folder)
    assert imported.config.architecture.hidden == 128
    assert "model.llm.pretrained_model_name_or_path" not in left_out(imported)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            ('weights = "deepseek-ai/DeepSeek-V2-Chat"', 'weights = "some/Model-9B"'),
            "neither a folder with config.json",
        ),
        (
            ('weights = "deepseek-ai/DeepSeek-V2-Chat"', "import os\nweights = os.environ['W']"),
            "without executing it",
        ),
        (("lr = 1e-5", "lr = compute_rate()"), r"(?s)without executing it.*compute_rate\(\)"),
        (
            ("type=SupervisedFinetune", "type=LLaVAModel"),
            "model.type = LLaVAModel: portmoe trains language models",
        ),
        (
            ("expert_in_one_shard=20", "expert_in_one_shard=7"),
            "moe.expert_in_one_shard=7 must divide the 160 experts",
        ),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(edited, edit, said):
    with pytest.raises(ConfigError, match=said):
        import_config(edited(DEEPSEEK, *edit))


def test_nothing_runs(edited, tmp_path):
    mark = tmp_path / "ran"
    path = edited(DEEPSEEK, "template = PROMPT_TEMPLATE.deepseek_v2", f"template = open({str(mark)!r}, 'w')")
    import_config(path)
    assert not mark.exists()


def test_another_optimizer_and_adapters_are_told(edited):
    path = edited(
        DEEPSEEK,
        "optim_type = AdamW",
        "from lion import Lion\noptim_type = Lion",
        "    llm=dict(",
        "    lora=dict(r=64),\n    llm=dict(",
    )
    imported = import_config(path)
    found = left_out(imported)
    assert "AdamW" in found["optim_wrapper.optimizer.type"].why
    assert "all weights are trained" in found["model.lora.r"].why
    assert imported.model_may_differ
