"""Ways to doctor a run directory, and where `portmoe verify` must point.

Half of them leave the chain of hashes as it was; the others take it away or write one that fits, so that what
is checked beside it has to speak.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import torch.distributed.checkpoint as dcp

from portmoe.checkpoint.folder import crc32
from portmoe.record.chain import Chain

LINE = 6  # that is edited: of step 5
STEP = "checkpoints/step-00000005"


def lines_of(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines(keepends=True)


def write_lines(run: Path, lines: list[str]) -> None:
    (run / "metrics.jsonl").write_text("".join(lines))


def edit(run: Path, number: int = LINE, **changes) -> None:
    """Change numbers of one line; "__" stands for a slash."""
    lines = lines_of(run)
    record = json.loads(lines[number - 1])
    for key, change in changes.items():
        key = key.replace("__", "/")
        assert key in record, key
        record[key] = change(record[key]) if callable(change) else change
    lines[number - 1] = json.dumps(record) + "\n"
    write_lines(run, lines)


def rechained(run: Path) -> None:
    """Write the chain anew, as if all had been written so."""
    (run / "chain.jsonl").unlink()
    chain = Chain(run)
    chain.start(0, "2026-01-01T00:00:00.000+00:00")
    saved = {int(folder.name[5:]): folder for folder in (run / "checkpoints").glob("step-????????")}
    for line in [None, *lines_of(run)]:
        step = -1 if line is None else json.loads(line)["step"]
        if line is not None:
            chain.step(step, line)
        if step + 1 in saved:
            chain.checkpoint(step + 1, saved[step + 1] / "state.json")


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree, indent=2) + "\n")


def flip(path: Path, place: float) -> None:
    """Another byte somewhere in a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0xFF
    path.write_bytes(content)


def shards(run: Path) -> list[Path]:
    return sorted((run / STEP).glob("*.distcp"))


def refit_checksums(folder: Path) -> None:
    edit_json(
        folder / "state.json",
        lambda state: state["files"].update({name: crc32(folder / name) for name in state["files"]}),
    )


def other_weights(run: Path) -> None:
    """A tensor written anew, by the library that writes them, with checksums that fit."""
    folder = run / STEP
    metadata = dcp.FileSystemReader(folder).read_metadata()
    import torch

    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    tensors["model.head.weight"].mul_(1.01)
    kept = json.loads((folder / "state.json").read_text())
    for path in folder.iterdir():
        path.unlink()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    kept["files"] = {path.name: zlib.crc32(path.read_bytes()) for path in folder.iterdir()}
    (folder / "state.json").write_text(json.dumps(kept, indent=1))


def lower_loss(run: Path) -> None:
    """Every figure that hangs on it too."""
    edit(
        run,
        loss=lambda loss: loss * 0.9,
        loss_from_metric=lambda loss: loss * 0.9,
        loss__en=lambda loss: loss * 0.9,
        perplexity=lambda value: value**0.9,
    )


def without_log(run: Path) -> None:
    """The log's losses as the lines have them."""
    (run / "train.log").write_text("")


# name → (what is done, where a failing result points)
TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a loss edited": (lambda run: edit(run, loss=1.0), f"metrics.jsonl:{LINE}"),
    "lines reformatted": (
        lambda run: write_lines(run, [line.replace(": ", ":") for line in lines_of(run)]),
        f"metrics.jsonl:{LINE}",
    ),
    "a line taken out": (
        lambda run: write_lines(run, lines_of(run)[:5] + lines_of(run)[6:]),
        "metrics.jsonl",
    ),
    "a line twice": (lambda run: write_lines(run, lines_of(run)[:6] + lines_of(run)[5:]), "metrics.jsonl:7"),
    "two lines exchanged": (
        lambda run: write_lines(run, [*lines_of(run)[:5], *lines_of(run)[6:4:-1], *lines_of(run)[7:]]),
        f"metrics.jsonl:{LINE}",
    ),
    "a line added": (
        lambda run: write_lines(run, [*lines_of(run), lines_of(run)[-1].replace('"step": 9', '"step": 10')]),
        "metrics.jsonl:11",
    ),
    "the last lines cut off": (lambda run: write_lines(run, lines_of(run)[:8]), "metrics.jsonl"),
    "half a line": (
        lambda run: write_lines(run, [*lines_of(run)[:5], lines_of(run)[5][:40] + "\n", *lines_of(run)[6:]]),
        f"metrics.jsonl:{LINE}",
    ),
    "another learning rate in the config": (
        lambda run: (run / "config.yaml").write_text(
            (run / "config.yaml").read_text().replace("lr: 0.001", "lr: 0.002")
        ),
        "config.yaml",
    ),
    "another device": (
        lambda run: edit_json(run / "environment.json", lambda tree: tree.update(device="NVIDIA H200")),
        "environment.json",
    ),
    "another implementation": (
        lambda run: (run / "ops.json").write_text((run / "ops.json").read_text().replace("fused", "other")),
        "ops.json",
    ),
    "a number that is none": (lambda run: edit(run, step_time="fast"), f"metrics.jsonl:{LINE} step_time"),
    "no chain": (lambda run: (run / "chain.jsonl").unlink(), "chain.jsonl"),
    "an entry of the chain edited": (
        lambda run: (run / "chain.jsonl").write_text(
            (run / "chain.jsonl").read_text().replace('"step": 3, "sha256": "', '"step": 3, "sha256": "0', 1)
        ),
        "chain.jsonl:6",
    ),
    "a byte of a tensor": (lambda run: flip(shards(run)[0], 0.5), "model.|optimizer."),
    "a shard taken away": (lambda run: shards(run)[0].unlink(), f"{STEP}/__0_0.distcp"),
    "a checkpoint taken away": (lambda run: shutil.rmtree(run / STEP), STEP),
    "other weights, with checksums that fit": (other_weights, f"{STEP}/state.json"),
    "another run's checkpoint": (
        lambda run: (
            shutil.rmtree(run / STEP),
            shutil.copytree(run / "checkpoints/step-00000009", run / STEP),
        ),
        f"{STEP}/state.json",
    ),
    # With a chain that fits: by sums, schedules and batches.
    "a learning rate edited, rechained": (
        lambda run: (edit(run, lr=5e-4), rechained(run)),
        f"metrics.jsonl:{LINE}",
    ),
    "a loss edited, rechained": (
        lambda run: (edit(run, loss=1.0), rechained(run)),
        f"metrics.jsonl:{LINE}",
    ),
    "a norm edited, rechained": (
        lambda run: (edit(run, grad_norm__default=0.5), rechained(run)),
        f"metrics.jsonl:{LINE}",
    ),
    "a faster step, rechained": (
        lambda run: (edit(run, step_time=lambda seconds: seconds / 2), rechained(run)),
        f"metrics.jsonl:{LINE}",
    ),
    "another batch, rechained": (
        lambda run: (edit(run, data_crc32="00000000"), rechained(run)),
        f"metrics.jsonl:{LINE}",
    ),
    "padding that was none, rechained": (
        lambda run: (edit(run, padding_share=0.25), rechained(run)),
        f"metrics.jsonl:{LINE}",
    ),
    "more learned, rechained": (
        lambda run: (edit(run, trained_token_share=0.99), rechained(run)),
        f"metrics.jsonl:{LINE}",
    ),
    "fewer tokens, rechained": (
        lambda run: (edit(run, num_consumed_tokens=lambda count: count + 256), rechained(run)),
        f"metrics.jsonl:{LINE}",
    ),
    "more updates, rechained": (
        lambda run: (
            edit_json(run / STEP / "state.json", lambda tree: tree["state"]["engine"].update(updates=50)),
            rechained(run),
        ),
        f"{STEP}/state.json",
    ),
    "a finished run that is not": (
        lambda run: (write_lines(run, lines_of(run)[:9]), rechained(run)),
        "metrics.jsonl:9",
    ),
}

# Consistent but for what a device computes: name → (what is done, what a replay says differs first).
REWRITTEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "lower losses everywhere": (
        lambda run: (lower_loss(run), without_log(run), rechained(run)),
        "step 5 loss",
    ),
    "other weights everywhere": (lambda run: (other_weights(run), rechained(run)), "step 5 loss"),
    "another auxiliary loss": (
        lambda run: (edit(run, moe_loss=lambda loss: loss * 1.1), without_log(run), rechained(run)),
        "step 5 auxiliary loss",
    ),
}
