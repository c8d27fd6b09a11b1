"""config.json of published models as a config, and what of one is refused by name."""

import json

import pytest

from portmoe.cli.main import run as command
from portmoe.config.read import dump_config, load_config, parse_config
from portmoe.costs.parameters import count_parameters
from portmoe.errors import ConfigError
from portmoe.record.run_directory import first_difference

# What the published folders have, each as the program of its time wrote it.
BOTH = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
MIXTRAL_8X7B = BOTH | {
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "transformers_version": "4.36.0.dev0",
    "vocab_size": 32000,
}
DEEPSEEK_V2 = BOTH | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "transformers_version": "4.39.3",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
LITE = DEEPSEEK_V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
    "rope_scaling": DEEPSEEK_V2["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
QWEN = BOTH | {
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "hidden_size": 2048,
    "max_window_layers": 48,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B = QWEN | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rope_scaling": None,
    "sliding_window": None,
    "transformers_version": "4.51.0",
}
QWEN15_A27B = QWEN | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "transformers_version": "4.39.0.dev0",
}
PUBLISHED = {
    "mixtral_8x7b": (MIXTRAL_8X7B, 46_702_792_704),
    "deepseek_v2": (DEEPSEEK_V2, 235_741_434_880),
    "deepseek_v2_lite": (LITE, 15_706_484_224),
    "qwen3_30b_a3b": (QWEN3_30B, 30_532_122_624),
    "qwen15_moe_a27b": (QWEN15_A27B, 14_315_784_192),
}


@pytest.fixture
def folder(tmp_path):
    """``folder(content)``: a folder with this config.json."""

    def of(content, name="model"):
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return of


def of_folder(path, *lines):
    return parse_config("\n".join([f"model: {{from_pretrained: {path}}}", *lines]), "c")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_whole_architecture_and_the_packaged_one_agrees(name, folder):
    content, parameters = PUBLISHED[name]
    path = folder(content)
    config = of_folder(path)
    assert count_parameters(config).total == parameters
    packaged = load_config(name, [f"model.from_pretrained={path}"])
    assert packaged.architecture == config.architecture == load_config(name).architecture
    assert packaged.model_type == config.model_type == content["model_type"]


def test_newer_programs_write_the_rotary_keys_in_one(folder):
    newer = {k: v for k, v in LITE.items() if k not in ("rope_scaling", "rope_theta")}
    scaling = {k: v for k, v in LITE["rope_scaling"].items() if k != "type"}
    newer["rope_parameters"] = {"rope_theta": 10000, "rope_type": "yarn", **scaling}
    newer |= {"head_dim": 64, "qk_head_dim": 192, "mlp_bias": False, "dtype": "bfloat16"}
    assert of_folder(folder(newer)).architecture == of_folder(folder(LITE, "older")).architecture


def test_options_of_other_families_that_are_off_are_passed_over(folder):
    coder = QWEN3_30B | {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
    assert of_folder(folder(coder)).architecture == of_folder(folder(QWEN3_30B, "plain")).architecture


def test_null_and_what_it_stands_for_are_the_same(folder):
    path = folder(MIXTRAL_8X7B)  # has no head_dim
    assert of_folder(path, "").model.head_dim is None
    config = load_config("mixtral_8x7b", [f"model.from_pretrained={path}", "model.head_dim=128"])
    assert config.architecture.layers[0].attention.head_dim == 128


def test_training_keys_keep_their_place_and_coefficients_may_be_others(folder):
    path = folder(LITE)
    keys = ["model.dtype=float32", "model.checkpoint=0.5", "model.aux_loss_alpha=0.01", "model.seq_aux=false"]
    config = load_config("deepseek_v2_lite", [f"model.from_pretrained={path}", *keys])
    assert (config.model.dtype, config.model.checkpoint) == ("float32", 0.5)
    assert (config.model.aux_loss_alpha, config.model.seq_aux) == (0.01, False)


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("mixtral_8x22b", "data.total_steps=5", "model.hidden_size=6144, and .*config.json has 4096"),
        ("mixtral_8x7b", "model.num_local_experts=4", "model.num_local_experts=4, and .* has 8"),
        ("mixtral_8x7b", "model.head_dim=64", "model.head_dim=64, and .* has null"),
        ("mixtral_8x7b", "model.rope_scaling={type: yarn, factor: 2.0}", "model.rope_scaling=.*factor"),
        ("mixtral_8x7b", "model.rope_theta=5e5", "model.rope_theta=500000.0, and .* has 1000000.0"),
        ("qwen3_30b_a3b", "data.total_steps=5", "model_type='qwen3_moe', and .* says 'mixtral'"),
        ("tiny_moe4", "data.total_steps=5", "model_type='INTERNLM_MoE', and .* says 'mixtral'"),
    ],
)
def test_a_key_beside_the_folder_that_disagrees_is_refused_by_name(name, override, said, folder):
    with pytest.raises(ConfigError, match=said):
        load_config(name, [f"model.from_pretrained={folder(MIXTRAL_8X7B)}", override])


def without(content, *keys):
    return {key: value for key, value in content.items() if key not in keys}


REFUSED = {
    "no config.json": (None, "config.json cannot be read"),
    "no JSON": ('{"model_type": "mixtral",', "config.json is no JSON"),
    "a list": ("[]", "must hold one JSON object"),
    "a key twice": ('{"vocab_size": 1, "vocab_size": 2}', "'vocab_size' is there twice"),
    "no type": (
        without(MIXTRAL_8X7B, "model_type"),
        "model_type = null: must be one of deepseek_v2, mixtral",
    ),
    "another model": (MIXTRAL_8X7B | {"model_type": "llama"}, "model_type = 'llama'"),
    "code of its own": (DEEPSEEK_V2 | {"model_type": "mine"}, r"\(auto_map\) is never run"),
    "another head": (MIXTRAL_8X7B | {"architectures": ["MixtralForTokenClassification"]}, "architectures ="),
    "quantized": (MIXTRAL_8X7B | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config = "),
    "dynamic rotary": (LITE | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type = \"'dynamic'\""),
    "new rotary": (LITE | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
    "rotary key": (
        LITE | {"rope_scaling": LITE["rope_scaling"] | {"finetuned": True}},
        "rope_scaling.finetuned: unknown key",
    ),
    "window": (MIXTRAL_8X7B | {"sliding_window": 4096}, "sliding_window = 4096"),
    "window in use": (QWEN15_A27B | {"use_sliding_window": True}, "use_sliding_window = true"),
    "layers of a window": (
        QWEN15_A27B | {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types = ",
    ),
    "activation": (MIXTRAL_8X7B | {"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'silu'"),
    "tied": (QWEN3_30B | {"tie_word_embeddings": True}, "tie_word_embeddings = true"),
    "dropout": (MIXTRAL_8X7B | {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    "scores": (DEEPSEEK_V2 | {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
    "gate": (DEEPSEEK_V2 | {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
    "biases": (DEEPSEEK_V2 | {"mlp_bias": True}, "mlp_bias = true"),
    "unknown key": (
        MIXTRAL_8X7B | {"logit_scale": 0.5},
        "logit_scale = 0.5: not known for model_type 'mixtral'",
    ),
    "missing key": (without(MIXTRAL_8X7B, "num_local_experts"), "lacks num_local_experts"),
    "text for a number": (MIXTRAL_8X7B | {"vocab_size": "32000"}, "vocab_size = '32000'"),
    "text for a window": (MIXTRAL_8X7B | {"sliding_window": "all"}, "sliding_window = 'all'"),
    "no list of layers": (QWEN15_A27B | {"layer_types": 3}, "layer_types = 3"),
    "no query norm": (QWEN3_30B | {"use_qk_norm": False}, "use_qk_norm = false"),
    "a width that is no sum": (LITE | {"qk_head_dim": 200}, "qk_head_dim = 200"),
    "heads": (MIXTRAL_8X7B | {"num_key_value_heads": 5}, "num_attention_heads=32 must be a multiple"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name(case, folder, tmp_path):
    content, said = REFUSED[case]
    path = tmp_path if content is None else folder(content)
    with pytest.raises(ConfigError, match=said) as caught:
        of_folder(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("key", ["export_every=5", "export_dtype=bfloat16"])
def test_what_asks_for_the_hubs_format_is_refused_where_there_is_none(key):
    with pytest.raises(
        ConfigError, match=f"ckpt.{key.partition('=')[0]}=.* model_type='INTERNLM_MoE' has none"
    ):
        load_config("tiny_moe4", [f"ckpt.{key}"])
    load_config("tiny_moe4", ["ckpt.export_every=0"])
    load_config("tiny_mixtral", [f"ckpt.{key}"])


@pytest.mark.parametrize("model_type", ["[1]", "3"])
def test_a_model_type_that_is_none_is_named(model_type, folder):
    with pytest.raises(ConfigError, match="model_type="):
        of_folder(folder(LITE), f"model_type: {model_type}")


def test_no_folder_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="must be downloaded first"):
        of_folder("mistralai/Mixtral-8x7B-v0.1")


def test_the_same_model_in_another_place_is_the_same_run(folder):
    here, there = of_folder(folder(LITE)), of_folder(folder(LITE, "elsewhere"))
    assert here.model.from_pretrained != there.model.from_pretrained
    assert first_difference(here, there) is None
    other = of_folder(folder(MIXTRAL_8X7B, "another"))
    assert first_difference(here, other)[0] == "model_type"


def test_a_resolved_config_needs_the_folder_no_more_and_is_held_to_it_where_it_is(folder, tmp_path):
    path = folder(LITE)
    text = dump_config(of_folder(path))
    assert parse_config(text, "c").architecture == of_folder(path).architecture
    (path / "config.json").rename(tmp_path / "gone.json")
    assert parse_config(text, "c").model.kv_lora_rank == 512
    folder(LITE | {"kv_lora_rank": 256})
    with pytest.raises(ConfigError, match=r"model.kv_lora_rank=512, and .* has 256"):
        parse_config(text, "c")


def test_a_folder_by_set_alone_is_a_whole_config(folder, capsys):
    path = folder(LITE)
    assert command(["config", "--set", f"model.from_pretrained={path}", "--set", "adam.lr=1e-5"]) == 0
    config = parse_config(capsys.readouterr().out, "c")
    assert config.architecture == of_folder(path).architecture
    assert config.adam.lr == 1e-5
    assert command(["config"]) == 0
    assert "model_type: INTERNLM_MoE" in capsys.readouterr().out
