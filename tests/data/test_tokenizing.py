"""Tokens are made once: whatever ends the process, however many make them, and only of what has changed."""

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conversations import conversation, record, trained_tokenizer, write

import portmoe
from portmoe.data.sources.opened import open_samples
from portmoe.data.tokenizing import cache, worker
from portmoe.errors import ConfigError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of a config over 300 conversations in two files, in many parts."""
    folder = tmp_path_factory.mktemp("tokenizing")
    rng = random.Random(8)
    for name, form in (("a.jsonl", "sharegpt"), ("b.json", "xtuner")):
        told = [record(conversation(rng, form), form) for _ in range(150)]
        told[50] = {"other": "fields"}
        (folder / "data").mkdir(exist_ok=True)
        write(folder / "data" / name, told)
    tokenizer = trained_tokenizer(folder / "tokenizer")
    said = {
        "train_folder": folder / "data",
        "tokenizer": tokenizer,
        "chat_template": "chatml",
        "seq_len": 512,
    }
    return [f"data.{key}={value}" for key, value in said.items()]


def tokens(settings, folder):
    """All there is: tokens, what is learned, and what is said."""
    found = open_samples(
        portmoe.load_config("tiny_moe4", [*settings, f"data.cache_folder={folder}"]), "train"
    )
    samples = [found.samples[0].sample(index) for index in range(len(found.samples[0]))]
    return (
        np.concatenate([one.tokens_T for one in samples]),
        np.concatenate([one.learned_T for one in samples]),
        found.said,
    )


def same(one, other):
    return (one[0] == other[0]).all() and (one[1] == other[1]).all() and one[2] == other[2]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """This process makes all itself; those it starts have two more."""
    monkeypatch.setattr(cache, "usable_cores", lambda: 1)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    return tokens(settings, tmp_path_factory.mktemp("whole"))


def started(settings, folder):
    command = [sys.executable, HERE / "tokenize_here.py", *settings, f"data.cache_folder={folder}"]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


def made(folder):
    return {path.name for path in folder.glob("*/[0-9]*.json")}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_what_a_killed_process_made_is_kept(settings, whole, tmp_path, kills):
    rng, counts = random.Random(kills), []
    for number in range(kills):
        ranks = [started(settings, tmp_path) for _ in range(2)]  # one makes it, the other waits
        wanted = len(made(tmp_path)) + rng.randint(1, 3)
        while len(made(tmp_path)) < wanted and any(rank.poll() is None for rank in ranks):
            time.sleep(0.005)
        for rank in ranks:
            if number % 2:
                rank.kill()  # alone: the processes it started end by themselves
            else:
                with suppress(ProcessLookupError):  # it had ended
                    os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
        counts.append(len(made(tmp_path)))
        if list(tmp_path.glob("*/whole.json")):
            break
    assert counts[0] > 0
    assert counts == sorted(counts)
    ranks = [started(settings, tmp_path) for _ in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert len(made(tmp_path)) > 30
    assert same(tokens(settings, tmp_path), whole)
    assert not list(tmp_path.glob("*/*.partial"))


def test_what_is_whole_is_not_made_again_and_what_was_damaged_is(settings, whole, tmp_path, monkeypatch):
    assert same(tokens(settings, tmp_path), whole)
    calls, make = [], worker.make_parts
    monkeypatch.setattr(cache, "make_parts", lambda *given: (calls.append(given[2]), make(*given)))
    assert same(tokens(settings, tmp_path), whole)
    assert not calls
    (damaged,) = tmp_path.glob("*/000000.tokens")
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert same(tokens(settings, tmp_path), whole)
    assert [[number for number, _, _ in work] for work in calls] == [[0]]
    next(tmp_path.glob("*/index.npy")).unlink()
    assert same(tokens(settings, tmp_path), whole)
    assert len(calls) == 2
    assert not calls[1]


def test_the_cache_goes_by_content_tokenizer_template_and_options(settings, tmp_path):
    def keys(*more):
        tokens([*settings, *more], tmp_path / "cache")
        return {path.parent.name for path in (tmp_path / "cache").glob("*/whole.json")}

    first = keys()
    data = Path(settings[0].partition("=")[2])
    shutil.copytree(data, tmp_path / "moved")
    moved = f"data.train_folder={tmp_path / 'moved'}"
    assert keys(moved, "data.seq_len=100") == first  # elsewhere, at another time, another length: the same
    assert len(keys("data.train_on=all")) == 2
    assert len(keys("data.chat_template=internlm2")) == 3
    other = trained_tokenizer(tmp_path / "other", eos_token="<|im_end|>")
    assert len(keys(f"data.tokenizer={other}")) == 4
    lines = (tmp_path / "moved" / "a.jsonl").read_text(encoding="utf-8")
    (tmp_path / "moved" / "a.jsonl").write_text(lines.replace("router", "Router", 1), encoding="utf-8")
    assert len(keys(moved)) == 5


def test_a_cache_that_cannot_be_written(settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache_folder='.*file/x': .* cannot be written"):
        tokens(settings, tmp_path / "file" / "x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    open_samples(portmoe.load_config("tiny_moe4", settings), "train")
    assert list((tmp_path / "temporary").glob("*/data/*/whole.json"))


def test_a_worker_that_dies_is_said(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "__name__", "no.such.module")
    monkeypatch.setattr(cache, "usable_cores", lambda: 2)
    with pytest.raises(portmoe.PortmoeError, match=r"a process that tokenizes .* ended"):
        tokens(settings, tmp_path)


def test_one_process_makes_it_and_the_others_wait(settings, whole, tmp_path, monkeypatch):
    heard, calls, make = [], [], worker.make_parts
    monkeypatch.setattr(cache, "make_parts", lambda *given: (calls.append(given), make(*given)))
    assert same(tokens(settings, tmp_path / "first"), whole)
    key = next((tmp_path / "first").glob("*/whole.json")).parent.name
    shared = tmp_path / "shared"
    (shared / key).mkdir(parents=True)
    config = portmoe.load_config("tiny_moe4", [*settings, f"data.cache_folder={shared}"])
    with (shared / key / "lock").open("ab") as file, ThreadPoolExecutor(1) as other:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = other.submit(open_samples, config, "train", lambda *told: heard.append(told))
        while not heard:
            time.sleep(0.01)
        shutil.copytree(tmp_path / "first" / key, shared / key, dirs_exist_ok=True)
        assert len(waiting.result(timeout=60).samples[0]) == 298
    assert {told[0] for told in heard} == {"another process tokenizes"}
    assert len(calls) == 1


def test_a_file_system_without_locks_makes_the_same(settings, whole, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert same(tokens(settings, tmp_path), whole)
