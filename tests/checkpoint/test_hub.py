"""Weights in and out of the hub's format, against the libraries that people load it with."""

import json

import pytest
import torch
from hub_folders import VARIANTS, save, tensors

from portmoe.checkpoint import hub_files
from portmoe.checkpoint.hub_read import fill
from portmoe.checkpoint.hub_write import write
from portmoe.config import Config
from portmoe.config.pretrained import completed
from portmoe.config.read import load_config
from portmoe.data.batch import Batch
from portmoe.model import Decoder
from portmoe.ops import Segments
from portmoe.training import hub
from portmoe.training.beside import keep

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

FAST = ("mixtral", "qwen3, biases", "qwen2", "deepseek")
TOKENS_T = torch.randint(256, (24,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``folder(variant)``: the library's model and its folder, made once."""
    made = {}

    def of(variant):
        if variant not in made:
            path = tmp_path_factory.mktemp("hub") / "model"
            made[variant] = save(variant, path), path
        return made[variant]

    return of


def load(path, **keys):
    """The config a folder gives, the whole model with the folder's weights, and what was found of them."""
    model = {"from_pretrained": str(path), "dtype": "float32"}
    config = Config.model_validate(completed({"model": model, **keys}))
    decoder, weights = Decoder(config), hub.Weights.of(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(torch.nan)
    fill(dict(decoder.named_parameters()), weights.made, weights.folder)
    return config, decoder, weights


def logits(decoder):
    caught = []
    hook = decoder.norm.register_forward_hook(lambda _, __, x_TH: caught.append(x_TH))
    none_T, length = torch.zeros_like(TOKENS_T), len(TOKENS_T)
    batch = Batch(TOKENS_T, TOKENS_T, torch.arange(length), none_T, Segments((0, length)), index=0)
    with torch.no_grad():
        decoder.eval()(TOKENS_T, batch)
    hook.remove()
    return caught[0] @ decoder.head.weight.T


def theirs(model):
    with torch.no_grad():
        return model(TOKENS_T[None]).logits[0]


def loaded(path):
    """The library's model of a folder; nothing was missing and nothing too many."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    "variant",
    [v if v in FAST else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS],
)
def test_a_folder_gives_the_librarys_logits_and_goes_out_as_it_came(variant, folder, tmp_path, one_rank):
    model, path = folder(variant)
    config, decoder, weights = load(path)
    torch.testing.assert_close(logits(decoder), theirs(model), rtol=1e-5, atol=1e-5)
    run, out = tmp_path / "run", tmp_path / "run" / "hf_model"
    run.mkdir()
    keep(config, run, weights.folder)
    write(hub.target(config, run, out), dict(decoder.named_parameters()), weights.made, one_rank)
    assert_identical(tensors(out), tensors(path))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (path / name).read_bytes()
    torch.testing.assert_close(theirs(loaded(out)), theirs(model), rtol=0, atol=0)
    assert sorted(entry.name for entry in run.iterdir()) == ["hf_model", "pretrained"]


def test_a_model_that_came_from_no_folder_goes_out_with_a_config_of_its_own(tmp_path, one_rank):
    for name in ("tiny_mixtral",):
        config = load_config(name, ["model.dtype=float32", "model.vocab_size=256"])
        decoder = Decoder(config)
        target = hub.target(config, tmp_path, tmp_path / name)
        write(
            target, dict(decoder.named_parameters()), hub.hub_of(config).made(config.architecture), one_rank
        )
        torch.testing.assert_close(theirs(loaded(tmp_path / name)), logits(decoder), rtol=1e-5, atol=1e-5)


def mixed(path, to):
    """The same folder with its weights in 16 bits, all in one file but the gates, which stay float32."""
    to.mkdir()
    for file in path.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (to / file.name).write_bytes(file.read_bytes())
    kinds = {"gate.weight": torch.float32, "norm.weight": torch.float16}
    found = {
        name: value.to(next((kinds[end] for end in kinds if name.endswith(end)), torch.bfloat16))
        for name, value in tensors(path).items()
    }
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float64)  # as old files
    safetensors.save_file(found, to / "model.safetensors", metadata={"format": "pt"})
    return found


def test_each_tensor_keeps_the_dtype_of_its_source(folder, tmp_path, one_rank):
    _, path = folder("deepseek")
    source = mixed(path, tmp_path / "mixed")
    auxiliary = {name for name in source if "inv_freq" in name}
    config, decoder, weights = load(tmp_path / "mixed")
    assert set(weights.folder.auxiliary) == auxiliary
    gate = decoder.layers["1"].moe.router.weight
    assert torch.equal(gate, source["model.layers.1.mlp.gate.weight"])
    assert torch.equal(
        decoder.layers["1"].moe.experts.w2[3], source["model.layers.1.mlp.experts.3.down_proj.weight"]
    )
    keep(config, tmp_path, weights.folder)
    parameters = dict(decoder.named_parameters())
    write(hub.target(config, tmp_path, tmp_path / "out"), parameters, weights.made, one_rank)
    assert_identical(tensors(tmp_path / "out"), {n: v for n, v in source.items() if n not in auxiliary})
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()  # readers that map want tensors at such bytes
    begin = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8:begin]).items():
        if name != "__metadata__":
            assert (begin + entry["data_offsets"][0]) % (4 if entry["dtype"] == "F32" else 2) == 0, name
    target = hub.target(config, tmp_path, tmp_path / "half", dtype="float16")
    write(target, parameters, weights.made, one_rank)
    assert {value.dtype for value in tensors(tmp_path / "half").values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


def test_files_of_five_gigabytes_have_an_index_that_the_library_reads(
    folder, tmp_path, one_rank, monkeypatch
):
    _, path = folder("mixtral")
    config, decoder, weights = load(path)
    monkeypatch.setattr(hub_files, "FILE_BYTES", 30_000)
    keep(config, tmp_path, weights.folder)
    write(
        hub.target(config, tmp_path, tmp_path / "out"),
        dict(decoder.named_parameters()),
        weights.made,
        one_rank,
    )
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 34_000 for file in files)
    assert_identical(tensors(tmp_path / "out"), tensors(path))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == json.loads((path / "model.safetensors.index.json").read_text())["metadata"]
    loaded(tmp_path / "out")
