"""Folders of the hub read into every kind of layout and written from it."""

import pytest
from hub_folders import save, tensors
from layout_keys import EP2, FSDP, ISP, MSP, NO_EP, PP2, REPLICAS, TP2, TP4, WEIGHT2

from portmoe.training.hub import export_run

pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")

# The first step has a rate of 0: what is written after it is what came in.
CONFIG = """
model: {{from_pretrained: {folder}, dtype: float32}}
data: {{seq_len: 32, micro_bsz: 1, global_batch_size: 4, num_samples: 50, total_steps: 2}}
adam: {{lr: 1e-3}}
lr_scheduler: {{init_steps: 1}}
ckpt: {{enable_save_ckpt: true, export_every: 1}}
"""
VARIANTS = ("mixtral", "qwen3", "qwen2", "deepseek")
LAYOUTS = {
    "one": (1, []),
    "dp": (4, [NO_EP, REPLICAS]),
    "zero3": (4, [NO_EP, FSDP]),
    "ep": (4, []),
    "mtp": (4, [TP4, NO_EP]),
    "msp": (4, [TP2, MSP, NO_EP]),
    "isp": (4, [TP2, ISP, WEIGHT2]),
    "pp": (2, [PP2, NO_EP]),
    "pp ep": (4, [PP2, EP2, FSDP]),
}
FAST = [
    ("deepseek", "pp ep"),
    ("deepseek", "mtp"),
    ("mixtral", "isp"),
    ("qwen2", "msp"),
]
SLOW = [(variant, layout) for variant in VARIANTS for layout in LAYOUTS if (variant, layout) not in FAST]


def train(config, directory, overrides):
    """One rank's part of a run."""
    from portmoe.config.read import load_config
    from portmoe.training.run import train

    train(load_config(config, [f"run.directory={directory}", *overrides]), "c", "cpu", "torchrun")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """``source(variant)``: the folder of a model."""
    made = {}

    def of(variant):
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("hub") / "model"
            save(variant, made[variant])
        return made[variant]

    return of


def assert_in_and_out(variant, layout, source, world, tmp_path):
    ranks, overrides = LAYOUTS[layout]
    folder, config, run = source(variant), tmp_path / "c.yaml", tmp_path / "run"
    config.write_text(CONFIG.format(folder=folder))
    world(ranks).call(train, config, run, overrides)
    before, first, last = tensors(folder), tensors(run / "hf_model-1"), tensors(run / "hf_model")
    assert first.keys() == before.keys()
    assert [name for name in before if not first[name].equal(before[name])] == []
    assert [name for name in before if last[name].equal(before[name])] == []
    export_run(run, None, tmp_path / "out", None)
    for file in sorted((run / "hf_model").iterdir()):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list((tmp_path / "out").iterdir())) == len(list((run / "hf_model").iterdir()))


@pytest.mark.parametrize(("variant", "layout"), FAST)
def test_in_and_out(variant, layout, source, world, tmp_path):
    assert_in_and_out(variant, layout, source, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "layout"), SLOW)
def test_in_and_out_of_every_layout(variant, layout, source, world, tmp_path):
    assert_in_and_out(variant, layout, source, world, tmp_path)
