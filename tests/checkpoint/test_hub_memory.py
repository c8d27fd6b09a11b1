"""What reading and writing a folder of the hub takes: memory of a shard and a few MiB, and only its bytes."""

import json
import re
from pathlib import Path

import pytest
import torch
import worlds
from worlds import World

files = pytest.importorskip("safetensors.torch")

MIB = 2**20
KEYS = {
    "architectures": ["MixtralForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "mixtral",
    "num_attention_heads": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "vocab_size": 8192,
}


def make(folder, hidden, width, layers, random=True):
    """A folder in bfloat16, in the files of several sizes that its writer happened to make."""
    folder.mkdir()
    keys = KEYS | {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(keys))
    shapes = {"model.embed_tokens.weight": (8192, hidden), "lm_head.weight": (8192, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, shape in {
            "q": (hidden, hidden),
            "k": (hidden // 4, hidden),
            "v": (hidden // 4, hidden),
        }.items():
            shapes[f"{at}.self_attn.{name}_proj.weight"] = shape
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{at}.block_sparse_moe.gate.weight"] = (8, hidden)
        for expert in range(8):
            for name, shape in {"w1": (width, hidden), "w3": (width, hidden), "w2": (hidden, width)}.items():
                shapes[f"{at}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    weight_map, names = {}, list(shapes)
    for number in range(0, len(names), 40):
        part = names[number : number + 40]
        file = f"model-{number // 40 + 1:05d}.safetensors"
        made = {name: torch.zeros(shapes[name], dtype=torch.int16) for name in part}
        for value in made.values() if random else ():
            value.random_(2**14)
        files.save_file({name: value.view(torch.bfloat16) for name, value in made.items()}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max(2 * torch.Size(shape).numel() for shape in shapes.values())


def memory(kind):
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def read_so_far():
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


class Grown:
    """How far resident memory rises over what it was, and how many bytes are read, in a block."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._before, self._read = memory("VmRSS"), read_so_far()
        return self

    def __exit__(self, *_):
        self.memory, self.read = memory("VmHWM") - self._before, read_so_far() - self._read


def in_and_out(folder, run, overrides):
    """One rank: (bytes of its shards as float32, grown on reading, bytes read, grown on writing)."""
    import torch.distributed as dist

    import portmoe
    from portmoe.checkpoint.hub_read import fill
    from portmoe.checkpoint.store import Checkpointer
    from portmoe.config.read import dump_config
    from portmoe.launch import launch
    from portmoe.launch.ranks import detect
    from portmoe.model.precision import local_tensor
    from portmoe.model.reference_table import reference_table
    from portmoe.parallel.build import build
    from portmoe.parallel.layout import Layout
    from portmoe.parallel.mesh import build_meshes
    from portmoe.training import hub
    from portmoe.training.beside import keep
    from portmoe.training.hub import Weights, target, write

    ranks = detect("torchrun")
    launch.start(portmoe.get_accelerator("cpu"), ranks, 60)
    group = dist.new_group(backend="gloo")
    config = portmoe.config.read.parse_config(f"model: {{from_pretrained: {folder}}}", "c", overrides)
    layout = Layout.plan(config, ranks.world_size)
    model = build(config, reference_table(), build_meshes(layout, "cpu")).to_empty(device="cpu")
    parameters = {name: p.detach() for decoder in model for name, p in decoder.named_parameters()}
    weights = Weights.of(config)
    with Grown() as reading:
        fill(parameters, weights.made, weights.folder)
    if ranks.rank == 0:
        (run / "config.yaml").write_text(dump_config(config))
        keep(config, run, weights.folder)
    dist.barrier()
    with Grown() as writing:
        write(target(config, run, run / "hf_model"), parameters, weights.made, group)
    checkpointer = Checkpointer(run / "checkpoints", 1, False, group)
    checkpointer.save(1, {f"{hub.PREFIX}{name}": p for name, p in parameters.items()}, {})
    checkpointer.close()
    launch.stop()
    shard = sum(4 * local_tensor(p).numel() for p in parameters.values())
    return shard, reading.memory, reading.read, writing.memory


def exported(run, out):
    """One process: how far ``portmoe export`` grows, all it imports while at work included."""
    from portmoe.training.hub import export_run

    with Grown() as exporting:
        export_run(run, None, out, None)
    return exporting.memory


def assert_lean(ranks, sizes, slack, overrides, tmp_path):
    folder, run = tmp_path / "model", tmp_path / "run"
    run.mkdir()
    largest = make(folder, *sizes)
    world = World(ranks)
    try:
        found = world.call(in_and_out, folder, run, overrides)
    finally:
        world.end()
    alone = World(1)
    try:
        (growth,) = alone.call(exported, run, tmp_path / "out")
    finally:
        alone.end()
    print(f"\n{ranks} ranks: " + "; ".join(f"{[round(n / MIB) for n in of_rank]}" for of_rank in found))
    print(f"export grew by {growth / MIB:.0f} MiB; largest tensor {largest / MIB:.0f} MiB")
    for shard, reading, read, writing in found:
        assert reading <= shard + largest + slack
        assert writing <= largest + slack
        assert read <= shard / 2 + 8 * MIB  # 16 bits of each number; and how much memory it takes
    assert growth <= largest + slack
    before = files.load_file(folder / "model-00001.safetensors")
    for out in (run / "hf_model", tmp_path / "out"):
        (file,) = out.glob("*.safetensors")
        with files.safe_open(file, "pt") as opened:
            for name, value in before.items():
                assert torch.equal(opened.get_tensor(name), value), name


def test_two_ranks_and_a_quarter_of_a_gigabyte(tmp_path):
    assert_lean(2, (512, 1792, 5), 96 * MIB, ["parallel.zero1.fsdp=true"], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, []),
        (2, ["parallel.zero1.fsdp=true", "parallel.expert.size=1"]),
        (4, ["parallel.zero1.fsdp=true", "parallel.expert.size=2"]),
        (4, ["parallel.tensor.size=4", "parallel.expert.size=1"]),
    ],
)
def test_two_gigabytes(ranks, overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "PATIENCE", 600)
    assert_lean(ranks, (1024, 3584, 12, False), 300 * MIB, overrides, tmp_path)
