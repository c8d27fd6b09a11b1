"""Broken folders of the hub: each is named, ends with exit code 2, and nothing of it is loaded."""

import json
import shutil

import pytest
import torch
from hub_folders import save
from run_portmoe import environment
from zygote import portmoe

from portmoe.cli.main import run as command
from portmoe.config import Config
from portmoe.config.pretrained import completed
from portmoe.errors import ConfigError
from portmoe.training import hub

pytest.importorskip("transformers")
files = pytest.importorskip("safetensors.torch")

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in several files, and one in a single file."""
    path = tmp_path_factory.mktemp("hub")
    save("deepseek", path / "several")
    save("deepseek", path / "single", file_bytes="5GB")
    return path


def file_of(folder, tensor):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def reindexed(folder, change):
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


def rewritten(folder, change):
    """The single file with other tensors, written by the library."""
    found = files.load_file(folder / "model.safetensors")
    change(found)
    files.save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def reheaded(folder, change):
    """The single file with another header before the same numbers."""
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


GATE, UP = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
FIRST = "model-00001-of-"


def truncate(path, less):
    with open(path, "r+b") as file:
        file.truncate(max(0, path.stat().st_size - less))


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def swap_names(content):
    weight_map = content["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[GATE])
    weight_map[GATE] = other


def overlap(header):
    names = [name for name in header if name != "__metadata__"]
    last = max(names, key=lambda name: header[name]["data_offsets"])
    size = header[last]["data_offsets"][1] - header[last]["data_offsets"][0]
    header[last]["data_offsets"] = [0, size]


# what is done to a folder (and to which), what must be said of it
BROKEN = {
    "no weights": (
        "single",
        lambda f: (f / "model.safetensors").unlink(),
        "holds neither model.safetensors nor",
    ),
    "only pickles": ("single", only_pickles, "pickles only, which are never read"),
    "no index": ("several", lambda f: (f / INDEX).unlink(), FIRST),
    "index no JSON": ("several", lambda f: (f / INDEX).write_text("{"), "index.json is no JSON"),
    "index without a map": (
        "several",
        lambda f: reindexed(f, lambda c: c.pop("weight_map")),
        "weight_map must be",
    ),
    "index out of the folder": (
        "several",
        lambda f: reindexed(f, lambda c: c["weight_map"].update({GATE: "../model.safetensors"})),
        "'../model.safetensors' must be a .safetensors file of the folder",
    ),
    "index names no file there": (
        "several",
        lambda f: file_of(f, GATE).unlink(),
        "which model.safetensors.index",
    ),
    "index lacks a tensor": (
        "several",
        lambda f: reindexed(f, lambda c: c["weight_map"].pop(GATE)),
        f"holds {GATE!r}, and {INDEX} does not name it",
    ),
    "index names a tensor too many": (
        "several",
        lambda f: reindexed(f, lambda c: c["weight_map"].update(more=c["weight_map"][GATE])),
        "lacks 'more'",
    ),
    "index takes a tensor for another file's": (
        "several",
        lambda f: reindexed(f, swap_names),
        f"{GATE!r}, and",
    ),
    "one file is cut short": ("several", lambda f: truncate(file_of(f, UP), 100), "is cut short"),
    "cut short in its header": (
        "single",
        lambda f: truncate(f / "model.safetensors", 10**9),
        "is cut short or no",
    ),
    "too long": (
        "single",
        lambda f: (f / "model.safetensors").open("ab").write(b"more"),
        "is too long",
    ),
    "no safetensors": (
        "single",
        lambda f: (f / "model.safetensors").write_bytes(b"\0" * 64),
        "its header is broken",
    ),
    "tensors over each other": ("single", lambda f: reheaded(f, overlap), "begins at byte"),
    "a tensor's bytes are not its shape's": (
        "single",
        lambda f: reheaded(f, lambda h: h[GATE].update(shape=[9, 9])),
        f"{GATE!r} of F32 [9, 9] cannot take bytes",
    ),
    "a tensor without a shape": (
        "single",
        lambda f: reheaded(f, lambda h: h[GATE].pop("shape")),
        f"{GATE!r} lacks",
    ),
    "a shape below 0": (
        "single",
        lambda f: reheaded(f, lambda h: h[GATE].update(shape=[-4, -32])),
        f"{GATE!r} has no dtype, shape",
    ),
    "a tensor is missing": ("single", lambda f: rewritten(f, lambda t: t.pop(UP)), f"{UP!r} is missing"),
    "a tensor too many": (
        "single",
        lambda f: rewritten(f, lambda t: t.update({"model.layers.2.norm.weight": torch.ones(3)})),
        "'model.layers.2.norm.weight' does not belong to this model",
    ),
    "another shape": (
        "single",
        lambda f: rewritten(f, lambda t: t.update({UP: t[UP][:, :-1].contiguous()})),
        f"{UP!r} is [24, 31] and must be [24, 32]",
    ),
    "quantized to a type of its own": (
        "single",
        lambda f: rewritten(f, lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
        f"{UP!r} (F8_E4M3) must be one of F32, BF16, F16",
    ),
    "no config": ("single", lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_named(case, whole, tmp_path, capsys):
    kind, change, said = BROKEN[case]
    folder = tmp_path / "model"
    shutil.copytree(whole / kind, folder)
    change(folder)
    assert command(["model", "inspect", str(folder)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert str(folder) in captured.err
    assert captured.err.count("error:") == 1
    assert not captured.out


def test_a_whole_folder_is_told(whole, capsys):
    assert command(["model", "inspect", str(whole / "several")]) == 0
    said = capsys.readouterr().out
    assert "deepseek_v2 (DeepseekV2ForCausalLM)" in said
    parameters = sum(
        value.numel() for value in files.load_file(whole / "single" / "model.safetensors").values()
    )
    assert f"{parameters:,} in all" in said


def test_training_ends_with_code_2_before_anything_is_made_of_it(whole, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(whole / "several", folder)
    truncate(file_of(folder, UP), 8)
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {{from_pretrained: {folder}}}\ndata: {{seq_len: 8, num_samples: 50, total_steps: 1}}"
    )
    done = portmoe(
        ["train", "--backend", "cpu", "--config", str(config), "--set", f"run.directory={out}"], environment()
    )
    assert done.returncode == 2
    assert "is cut short" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (out / "metrics.jsonl").exists()
    assert not (out / "pretrained").exists()


def test_nothing_is_loaded_of_a_folder_that_was_changed_after_the_config(whole, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(whole / "single", folder)
    config = Config.model_validate(completed({"model": {"from_pretrained": str(folder)}}))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"kv_lora_rank": 8}))
    with pytest.raises(ConfigError, match=r"model.kv_lora_rank=16, and .* has 8"):
        hub.Weights.of(config)
