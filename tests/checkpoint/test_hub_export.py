"""What a run leaves in the hub's format, and ``portmoe export`` of its checkpoints."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
from hub_folders import tensors

from portmoe.cli.main import run as command

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")

KEYS = [
    *("model.dtype=float32", "model.vocab_size=256", "model.hidden_size=32", "model.num_hidden_layers=2"),
    *("data.seq_len=32", "data.global_batch_size=2", "data.micro_bsz=1", "data.num_samples=50"),
    *("data.total_steps=3", "ckpt.checkpoint_every=1", "ckpt.keep=2", "ckpt.export_every=2"),
]


def train(directory, overrides, room):
    """One rank's run; returns its log."""
    from portmoe.checkpoint import hub_write
    from portmoe.config.read import load_config
    from portmoe.training.run import train

    usage = hub_write.shutil.disk_usage
    hub_write.shutil.disk_usage = lambda path: SimpleNamespace(free=usage(path).free if room else 1000)
    try:
        config = load_config("tiny_mixtral", [*KEYS, f"run.directory={directory}", *overrides])
        train(config, "c", "cpu", "torchrun")
    except Exception as error:  # as its words: the process that asks may not have its class
        return f"{type(error).__name__}: {error}"
    finally:
        hub_write.shutil.disk_usage = usage
    return (directory / "train.log").read_text()


def train_while_a_disk_fills(directory):
    """One rank's run, in which rank 1 finds no room for its part of hf_model."""
    from portmoe.checkpoint import arrays

    write = arrays.os.pwritev

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if os.environ["RANK"] == "1":
        arrays.os.pwritev = full
    try:
        return train(directory, ["ckpt.export_every=null"], True)
    finally:
        arrays.os.pwritev = write


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "run"
    (log,) = world(1).call(train, directory, [], True)
    assert "WARNING" not in log
    return directory


def same(a, b):
    names = sorted(file.name for file in a.iterdir())
    assert names == sorted(file.name for file in b.iterdir())
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_a_run_leaves_its_weights_and_an_export_of_its_checkpoints_is_the_same(finished, tmp_path, capsys):
    left = sorted(entry.name for entry in finished.iterdir() if entry.is_dir() and "hf" in entry.name)
    assert left == ["hf_model", "hf_model-2"]
    content = json.loads((finished / "hf_model" / "config.json").read_text())
    assert (content["model_type"], content["torch_dtype"]) == ("mixtral", "float32")
    _, told = transformers.AutoModelForCausalLM.from_pretrained(
        finished / "hf_model", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert command(["export", str(finished), "--out", str(tmp_path / "newest")]) == 0
    assert "the weights after step 3" in capsys.readouterr().out
    assert same(finished / "hf_model", tmp_path / "newest")
    (tmp_path / "older").mkdir()  # an empty folder is as good as none
    assert command(["export", str(finished), "--step", "2", "--out", str(tmp_path / "older")]) == 0
    assert same(finished / "hf_model-2", tmp_path / "older")
    assert not same(finished / "hf_model", tmp_path / "older")
    half = tmp_path / "half"
    assert command(["export", str(finished), "--dtype", "bfloat16", "--out", str(half)]) == 0
    for name, value in tensors(half).items():
        assert value.equal(tensors(tmp_path / "newest")[name].bfloat16()), name
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert not list(tmp_path.glob("*.partial"))


def damaged(run):
    (file,) = (run / "checkpoints" / "step-00000003").glob("*.distcp")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def other_family(run):
    (run / "config.yaml").write_text("model_type: INTERNLM_MoE")


def other_width(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("intermediate_size: 224", "intermediate_size: 225"))


# what is done to a run, further arguments, the exit code, what is said
REFUSED = {
    "no run": (lambda r: (r / "config.yaml").unlink(), [], 2, "holds no config.yaml"),
    "no checkpoint": (lambda r: shutil.rmtree(r / "checkpoints"), [], 2, "holds no checkpoint"),
    "no such step": (lambda r: None, ["--step", "1"], 2, "no checkpoint of step 1; there are 2, 3"),
    "no format": (
        other_family,
        [],
        2,
        "model_type='INTERNLM_MoE' has no format on the hub; these have one: deep",
    ),
    "another model": (other_width, [], 2, "moe.experts.w1 is [8, 224, 32] and must be [8, 225, 32]"),
    "a flipped bit": (damaged, [], 4, "is damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_named_and_leaves_nothing(case, finished, tmp_path, capsys):
    change, arguments, code, said = REFUSED[case]
    shutil.copytree(finished, tmp_path / "run")
    change(tmp_path / "run")
    assert command(["export", str(tmp_path / "run"), *arguments, "--out", str(tmp_path / "out")]) == code
    assert said in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]


def test_nothing_is_overwritten_and_no_room_is_said_before(finished, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert command(["export", str(finished), "--out", str(tmp_path / "full")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert command(["export", str(finished), "--out", str(tmp_path / "out")]) == 4
    assert "0.00 GiB free" in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["full"]


def test_a_disk_without_room_ends_no_run_that_has_a_checkpoint(world, tmp_path):
    (log,) = world(1).call(train, tmp_path / "saved", ["ckpt.export_every=null"], False)
    assert "WARNING: " in log
    assert f"portmoe export {tmp_path / 'saved'} --step 3" in log
    assert "finished after step 2" in log
    (log,) = world(1).call(train, tmp_path / "lost", ["ckpt.enable_save_ckpt=false"], False)
    assert log.startswith("TrainingError: ")
    (log,) = world(1).call(train, tmp_path / "none", ["ckpt.export_every=0"], False)
    assert "WARNING" not in log
    for name in ("saved", "lost", "none"):
        assert not list((tmp_path / name).glob("hf_model*"))


def test_a_disk_that_fills_on_one_rank_leaves_nothing_half_written(world, tmp_path):
    for log in world(2).call(train_while_a_disk_fills, tmp_path / "run"):
        assert "hf_model could not be written: No space left on device" in log
        assert "finished after step 2" in log
    assert not list((tmp_path / "run").glob("hf_model*"))
