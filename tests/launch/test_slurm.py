"""Jobs in a real SLURM, four nodes of it on this machine: layouts of tasks, and how jobs end and go on."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import slurm

PAGE = Path(__file__).parents[2] / "docs" / "slurm.md"
SMALL = (
    *("model.hidden_size=32", "model.vocab_size=448", "model.multiple_of=16", "data.seq_len=32"),
    *("data.global_batch_size=16", "data.num_samples=400", "data.total_steps=3"),
)
MANY = 4000  # steps: more than any of these jobs makes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(slurm.missing()), reason=f"not installed: {', '.join(slurm.missing())}"),
]


@pytest.fixture(scope="module")
def cluster():
    with slurm.cluster() as made:
        yield made


def train(run, *more):
    settings = (*SMALL, f"run.directory={run}", *more)
    return [
        *("portmoe", "train", "--config", "tiny_moe4", "--backend", "cpu"),
        *(part for key in settings for part in ("--set", key)),
    ]


def steps(run):
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]


def test_every_layout_of_four_tasks_is_the_same_run(cluster):
    layouts = {
        "one node": ("--nodes=1", "--ntasks=4"),
        "four nodes": ("--nodes=4", "--ntasks=4"),
        "cyclic": ("--nodes=2", "--ntasks=4", "--distribution=cyclic"),
    }
    found = {}
    for name, layout in layouts.items():
        run = cluster.folder / name.replace(" ", "-")
        code, said = cluster.run("srun", *layout, *train(run))
        assert code == 0, said
        assert "4 ranks: data 4" in (run / "train.log").read_text()
        found[name] = losses(run)
    assert len(found["one node"]) == 3
    assert found["four nodes"] == found["one node"]
    assert found["cyclic"] == found["one node"]


def script(cluster, run, name):
    """The page's script, as it stands there but for the machines, the model and the folder."""
    (text,) = re.findall(r"^```sh\n(#!/bin/bash\n.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    changes = {
        "--nodes=4": "--nodes=2",
        "--ntasks-per-node=8": "--ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8\n": "",
        "portmoe train --config 7b_moe4 --set run.directory=runs/moe": " ".join(
            train(run, f"data.total_steps={MANY}", "ckpt.checkpoint_every=1000")
        ),
    }
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    (cluster.folder / name).write_text(text)
    return name


def test_a_job_told_to_stop_saves_requeues_itself_and_goes_on(cluster):
    run = cluster.folder / "requeued"
    number = cluster.said("sbatch", "--parsable", script(cluster, run, "moe.sh"))
    cluster.wait(lambda: len(steps(run)) > 5, "the first steps")
    cluster.said("scancel", "--signal=TERM", number)  # what --signal=TERM@… sends before the limit
    cluster.wait(lambda: cluster.job(number)["Restarts"] == "1", "the job in the queue again")
    first = steps(run)
    assert list((run / "checkpoints").glob("step-*"))
    cluster.wait(lambda: len(steps(run)) > len(first) + 5, "the steps after it")
    assert steps(run)[: len(first) + 5] == list(range(len(first) + 5))
    # Cancelled by its user, it saves too, and does not come back.
    cluster.said("scancel", number)
    cluster.wait(lambda: cluster.job(number)["JobState"] in ("CANCELLED", "COMPLETING"), "its end")
    cluster.wait(lambda: "stopped by SIGTERM (saved" in (run / "train.log").read_text(), "what it saved")
    assert cluster.job(number)["Restarts"] == "1"


def test_the_rank_that_is_killed_is_named(cluster):
    run = cluster.folder / "killed"
    keys = (f"data.total_steps={MANY}", "run.collective_timeout=15")
    srun = cluster.start("srun", "--nodes=4", "--ntasks=4", *train(run, *keys))
    try:
        cluster.wait(lambda: len(steps(run)) > 2, "the first steps")
        os.kill(task(cluster, 2), signal.SIGKILL)
        said = srun.communicate(timeout=200)[0]
    finally:
        srun.kill()
    assert srun.returncode != 0
    assert "lost rank 2" in said, said
    assert "Traceback" not in said


def task(cluster, rank):
    """The process of a rank: the oldest one that SLURM gave its number."""
    wanted = {f"SLURM_PROCID={rank}".encode(), f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
        except OSError:
            continue
    return min(found)
