"""The README's torchrun line for several machines, on two hosts that share nothing but files."""

import json
import shlex
from pathlib import Path

import hosts
import pytest

README = Path(__file__).parents[2] / "README.md"
SMALL = (
    *("model.hidden_size=32", "model.vocab_size=448", "model.multiple_of=16", "data.seq_len=32"),
    *("data.global_batch_size=16", "data.num_samples=400", "data.total_steps=3"),
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def words(head, run):
    """The line's words, but for two ranks and a small model."""
    (line,) = [text for text in README.read_text().splitlines() if text.startswith("torchrun --nnodes")]
    line = line.replace("--nnodes 4", "--nnodes 2").replace("--nproc-per-node 8", "--nproc-per-node 1")
    assert "HEAD:29500" in line
    line = line.replace("HEAD", head).replace("--config 7b_moe4", "--config tiny_moe4 --backend cpu")
    settings = (*SMALL, f"run.directory={run}")
    return [*shlex.split(line), *(part for key in settings for part in ("--set", key))]


def test_torchrun_over_two_hosts_is_one_run(tmp_path):
    if not hosts.possible():
        pytest.skip("needs root and iproute2, to make network namespaces")
    run = tmp_path / "run"
    with hosts.two_hosts() as names:
        started = [hosts.start(name, *words(names[0], run)) for name in names]
        try:
            said = [process.communicate(timeout=200)[0] for process in started]
        finally:
            for process in started:
                process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    log = (run / "train.log").read_text()
    assert "2 ranks: data 2" in log
    assert all(name in log for name in names)  # the ranks' hosts, in the block at the start
