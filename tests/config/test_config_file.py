"""Reading configs that are right: names, overrides, number formats, the resolved file."""

import textwrap

import pytest

import portmoe
from portmoe.config import Config
from portmoe.config.read import default_model, dump_config, load_config, no_effect_notes, packaged_names
from portmoe.config.sections.data import DataConfig


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def test_packaged_names_work_with_and_without_ending():
    assert portmoe.load_config("tiny_moe4.yaml") == portmoe.load_config("tiny_moe4")
    assert {"7b_moe4.yaml", "tiny_moe4.yaml"} <= set(packaged_names())


def test_a_file_here_is_taken_before_a_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_moe4.yaml").write_text("JOB_NAME: mine")
    assert portmoe.load_config("tiny_moe4.yaml").JOB_NAME == "mine"


def test_a_folder_named_like_a_packaged_config_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_moe4").mkdir()
    assert portmoe.load_config("tiny_moe4").JOB_NAME == "tiny_moe4"


def test_7b_moe4_holds_the_values_of_the_benchmark():
    config = portmoe.load_config("7b_moe4")
    assert config.JOB_NAME == "7b_moe_train"
    assert (config.data.seq_len, config.data.micro_num, config.data.micro_bsz) == (2048, 8, 2)
    assert config.data.max_global_batch_size == 512
    assert (config.adam.lr, config.adam.adam_beta1, config.adam.adam_beta2) == (1e-4, 0.9, 0.95)
    assert (config.adam.adam_eps, config.adam.weight_decay) == (1e-8, 0.01)
    assert (config.lr_scheduler.eta_min, config.lr_scheduler.warmup_ratio) == (1e-5, 0.01)
    assert config.grad_scaler.fp16.initial_scale == 2**16
    assert config.grad_scaler.max_scale == 2**24
    assert config.hybrid_zero_optimizer.reduce_bucket_size == 512 * 1024 * 1024
    assert config.model.mlp_ratio == 4 / 3
    assert config.model.ffn_width == 5632
    assert config.model.dtype == "bfloat16"
    assert config.model.vocab_size == 103168
    assert (config.moe.top_k, config.moe.use_tutel, config.moe.use_rts) == (2, True, True)
    assert config.parallel.weight.memory_pool
    assert config.parallel.pipeline.interleaved_overlap


def test_the_packaged_configs_set_nothing_without_effect():
    for name in packaged_names():
        assert no_effect_notes(portmoe.load_config(name)) == []


def test_a_key_without_effect_is_reported_with_its_reason(tmp_path):
    path = write(tmp_path, "model: {parallel_output: false}")
    assert no_effect_notes(portmoe.load_config(path)) == [
        "model.parallel_output = false has no effect: logits are never gathered"
    ]


@pytest.mark.parametrize("name", ["7b_moe4", "tiny_moe4"])
def test_the_resolved_file_gives_the_same_config(name, tmp_path):
    config = portmoe.load_config(name)
    assert portmoe.load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    "text", ["1e-4", "yes", "null", "2026-01-31", "0x10", "1:30", "~", "a: b", "#", "", "é"]
)
def test_text_that_looks_like_something_else_survives_the_resolved_file(text, tmp_path):
    config = Config(JOB_NAME=text)
    loaded = portmoe.load_config(write(tmp_path, dump_config(config)))
    assert text == loaded.JOB_NAME


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        (".5e-3", 5e-4),
        ("1.e-3", 1e-3),
        ("+1e-4", 1e-4),
        ("3", 3.0),
        ("0.1", 0.1),
    ],
)
def test_every_way_to_write_a_number(written, value, tmp_path):
    path = write(tmp_path, f"adam: {{lr: {written}}}\nlr_scheduler: {{eta_min: 0}}")
    assert portmoe.load_config(path).adam.lr == value


@pytest.mark.parametrize("text", ["no", "on", "2026-01-31", "0o17", "0x1F", "1:30:00"])
def test_plain_text_stays_text(text, tmp_path):
    loaded = portmoe.load_config(write(tmp_path, f"JOB_NAME: {text}"))
    assert text == loaded.JOB_NAME


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("torch.bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("torch.half", "float16"),
        ("torch.float16", "float16"),
        ("torch.float32", "float32"),
        ("torch.tf32", "tf32"),
    ],
)
def test_dtype_aliases(written, name, tmp_path):
    assert portmoe.load_config(write(tmp_path, f"model: {{dtype: {written}}}")).model.dtype == name


def test_an_utf8_byte_order_mark_is_fine(tmp_path):
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfJOB_NAME: mine\n")
    assert portmoe.load_config(path).JOB_NAME == "mine"


def test_overrides_apply_in_order_and_parse_yaml():
    config = portmoe.load_config(
        "tiny_moe4",
        [
            "moe.top_k=3",
            "moe.top_k=1",
            "adam.lr=2e-3",
            "ops.disable=[attention.sdpa]",
            "run.directory=a=b",
            "moe.drop_tokens=false",
            "parallel.zero1={size: 1}",
            "data.num_samples=null",
        ],
    )
    assert config.moe.top_k == 1
    assert config.adam.lr == 2e-3
    assert config.ops.disable == ["attention.sdpa"]
    assert config.run.directory == "a=b"
    assert config.moe.drop_tokens is False
    assert config.parallel.zero1.size == 1
    assert config.data.num_samples is None


def test_an_override_creates_a_section_the_file_leaves_out(tmp_path):
    path = write(tmp_path, "JOB_NAME: mine")
    assert portmoe.load_config(path, ["parallel.zero1.size=4"]).parallel.zero1.size == 4


def largest_token_by_trying(seq_len, fixed):
    """Every (n, r) the dummy data can draw, doubled as its definition says."""
    largest = 0
    for n in range(1, 30):
        for drawn in range(10, 200):
            r = drawn
            while fixed and n * r < seq_len:
                r *= 2
            largest = max(largest, n, r)
    return largest


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("seq_len", [1, 10, 64, 199, 200, 201, 256, 1000, 2048, 4097])
def test_the_largest_dummy_token(seq_len, fixed):
    data = DataConfig(seq_len=seq_len, fixed_random_dataset_seqlen=fixed)
    assert data.largest_token() == largest_token_by_trying(seq_len, fixed)


def test_data_from_a_folder_has_no_largest_dummy_token():
    Config.model_validate({"data": {"train_folder": "somewhere"}, "model": {"vocab_size": 10}})


@pytest.mark.parametrize(("share", "layers"), [(False, 0), (True, 4), (0.5, 2), (0.3, 1)])
def test_the_layers_that_are_computed_again(share, layers):
    config = portmoe.load_config("tiny_moe4", ["model.num_layers=4", f"model.checkpoint={share}".lower()])
    assert config.recomputed_layers == layers


def test_a_config_that_leaves_the_model_out_says_which_defaults_hold():
    (said,) = default_model(Config())
    assert "32 layers, hidden size 4096, 4 experts" in said
    assert default_model(Config.model_validate({"model": {"dtype": "float32"}})) == [said]
    assert default_model(Config.model_validate({"model": {"num_layers": 2}})) == []
    assert default_model(load_config("7b_moe4")) == []
