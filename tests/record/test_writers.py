"""What a run leaves behind, also when it is resumed, when the disk is full and when nobody reads."""

import io
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from datetime import datetime

import pytest

from portmoe.errors import TrainingError
from portmoe.record.console import Console
from portmoe.record.flat import flat
from portmoe.record.writers import Writers, drop_steps_from, read_metrics


def record(step, loss=1.0):
    return {
        "step": step,
        "loss": loss,
        "tgs/tgs_all": 90.0,
        "tgs/tgs_SMA": 100.0,
        "inf_nan_skip_batches": 0,
        "grad_norm": {"default": 0.5, "experts": 0.25},
        "expert_load": [0.25, 0.75],
        "mfu": None,
        "loss/cn": math.nan,
    }


def write(directory, steps, first_step=0, queue=10, **options):
    stream = io.StringIO()
    writers = Writers(directory, 60, queue, first_step=first_step, style="full", stream=stream, **options)
    for step in steps:
        writers.step(record(step, loss=1 / (step + 1)))
    writers.close()
    return stream.getvalue()


def steps_of(directory):
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_one_object_and_one_line_per_step(tmp_path):
    shown = write(tmp_path, range(3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert all(datetime.fromisoformat(step.pop("timestamp")).tzinfo for step in written)
    assert written == [flat(record(step, 1 / (step + 1)) | {"loss/cn": None}) for step in range(3)]
    assert shown.splitlines()[1].startswith("step=1 loss=0.5 ")
    logged = (tmp_path / "train.log").read_text().splitlines()
    stamps, texts = zip(*(line.split(" ", 1) for line in logged), strict=True)
    assert list(texts) == shown.splitlines()
    assert all(datetime.fromisoformat(stamp).tzinfo for stamp in stamps)


def test_a_step_is_on_disk_before_the_next_begins(tmp_path):
    writers = Writers(tmp_path, 60, 10, stream=io.StringIO())
    writers.step(record(0))
    assert steps_of(tmp_path) == [0]
    assert "step=0" in (tmp_path / "train.log").read_text()
    writers.close()


def test_validation_is_part_of_its_steps_object(tmp_path):
    writers = Writers(tmp_path, 60, 10, stream=io.StringIO())
    writers.step(record(0), {"valid_loss": math.nan, "valid_acc": 0.5})
    writers.close()
    (step,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (step["loss"], step["valid_loss"], step["valid_acc"]) == (1.0, None, 0.5)


def test_other_ranks_write_nothing(tmp_path):
    assert write(tmp_path, range(3), enabled=False) == ""
    assert list(tmp_path.iterdir()) == []


def test_notes_go_to_console_and_log(tmp_path):
    stream = io.StringIO()
    writers = Writers(tmp_path, 60, 10, stream=stream)
    writers.note("two\nlines")
    writers.close()
    assert stream.getvalue() == "two\nlines\n"
    log = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in log] == ["two", "lines"]
    assert not (tmp_path / "tensorboard").exists()


def test_the_conclusion_stands_last(tmp_path):
    stream = io.StringIO()
    writers = Writers(tmp_path, 1, 10, stream=stream)
    writers.step(record(0))
    writers.conclude("all is well")
    writers.close()
    assert stream.getvalue().endswith("\nall is well\n")
    assert "all is well" in (tmp_path / "train.log").read_text()


def test_a_resumed_run_replaces_the_steps_it_does_again(tmp_path):
    write(tmp_path, range(8))
    write(tmp_path, range(5, 10), first_step=5)
    assert steps_of(tmp_path) == list(range(10))
    write(tmp_path, [], first_step=10)
    assert steps_of(tmp_path) == list(range(10))
    write(tmp_path, range(2), first_step=0)
    assert steps_of(tmp_path) == [0, 1]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2, "lo\n', b"\x00\x00\n", b"[]\n", b"\n"])
def test_a_torn_line_ends_the_metrics_and_is_cut(tmp_path, torn):
    write(tmp_path, range(2))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + torn)
    assert [step["step"] for step in read_metrics(metrics)] == [0, 1]
    drop_steps_from(metrics, 2)
    assert steps_of(tmp_path) == [0, 1]


@contextmanager
def file_size_limit(size):
    """Files cannot grow beyond ``size`` bytes: the last write is taken in part, the next one refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_is_an_error_with_path_and_fix_and_can_be_resumed(tmp_path):
    writers = Writers(tmp_path, 60, 1000, stream=io.StringIO())
    message = r"cannot write .*metrics\.jsonl.*run\.directory"
    steps = iter(range(60))
    with file_size_limit(500), pytest.raises(TrainingError, match=message):
        deque(map(writers.step, map(record, steps)))
    written = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert 0 < len(written) < 5
    assert next(steps) == len(written) + 1  # it was the torn step that failed
    assert (tmp_path / "metrics.jsonl").stat().st_size == 500  # the last line is torn
    writers.close()
    write(tmp_path, range(len(written), 6), first_step=len(written))
    assert steps_of(tmp_path) == list(range(6))


@pytest.mark.parametrize("name", ["train.log", "tensorboard"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, name):
    if name == "train.log":
        (tmp_path / name).symlink_to("/dev/full")
    else:
        (tmp_path / name).write_text("a file where a folder is wanted")
    writers = Writers(tmp_path, 60, 1, stream=io.StringIO())
    with pytest.raises(TrainingError, match=f"cannot write .*{name}"):
        writers.step(record(0))
    if name == "train.log":
        writers.close()


def test_a_missing_run_directory_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"cannot write .*nowhere.*No such file"):
        Writers(tmp_path / "nowhere", 60, 10, stream=io.StringIO())


LOSS = "0 overview/loss"


def events_of(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_reads_the_scalars(tmp_path):
    write(tmp_path, range(4))
    events = events_of(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars(LOSS)] == [
        (0, 1.0),
        (1, 0.5),
        (2, pytest.approx(1 / 3)),
        (3, 0.25),
    ]
    assert [event.value for event in events.Scalars("expert_load/1")] == [0.75] * 4
    assert {"grad_norm/default", "grad_norm/experts", "tgs/tgs_SMA"} <= set(events.Tags()["scalars"])
    assert not {"mfu", "loss/cn", "step"} & set(events.Tags()["scalars"])


def test_tensorboard_opens_on_what_a_run_is_looked_at_for_and_shows_no_empty_chart(tmp_path):
    shown = record(0) | {
        "tgs (tokens/gpu/second)": 100.0,
        "tgs/last_tgs_50": 0.0,
        "lr": 1e-3,
        "lr_next": 1e-4,
        **{f"{what}/{name}": float(name == "en") for what in ("acc", "tokens") for name in ("en", "cn")},
        "grad_norm_layers": {"experts": {"embedding": 0.0, "0": 0.5}},
    }
    writers = Writers(tmp_path, 60, 10, stream=io.StringIO())
    writers.step(shown)
    writers.close()
    tags = events_of(tmp_path).Tags()["scalars"]
    first = [tag for tag in sorted(tags) if tag.startswith(sorted(tags)[0].partition("/")[0])]
    assert first == [f"0 overview/{name}" for name in ("grad_norm", "loss", "lr", "tokens per second")]
    assert {"acc/en", "tokens/en", "grad_norm_layers/experts/0", "tgs/tgs_SMA"} <= set(tags)
    empty = {"acc/cn", "tokens/cn", "grad_norm_layers/experts/embedding", "tgs/last_tgs_50", "lr_next"}
    assert not empty & set(tags)


def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path, monkeypatch):
    write(tmp_path, range(8))
    # Event files are read in the order of their names, which hold the second of their creation.
    monkeypatch.setattr("time.time", lambda now=time.time: now() + 5)
    write(tmp_path, range(5, 7), first_step=5)
    assert [event.step for event in events_of(tmp_path).Scalars(LOSS)] == list(range(7))


@pytest.mark.parametrize("by", [0, -3600, 3600])
def test_tensorboard_shows_all_steps_whatever_the_clock_did(tmp_path, monkeypatch, by):
    write(tmp_path, range(5))
    for start in (4, 6):  # each resumption an hour off the one before
        monkeypatch.setattr("time.time", lambda now=time.time: now() + by)
        write(tmp_path, range(start, start + 3), first_step=start)
    assert [event.step for event in events_of(tmp_path).Scalars(LOSS)] == list(range(9))


def test_events_are_held_back_up_to_the_queue_length(tmp_path):
    writers = Writers(tmp_path, 60, 3, stream=io.StringIO())
    counts = []
    for step in range(4):
        writers.step(record(step))
        seen = (tmp_path / "tensorboard").exists() and events_of(tmp_path).Scalars(LOSS)
        counts.append(len(seen or []))
    assert counts == [0, 0, 3, 3]
    writers.close()
    assert len(events_of(tmp_path).Scalars(LOSS)) == 4


def test_tensorboard_is_not_imported_before_events_are_due(tmp_path):
    code = (
        "import sys; from pathlib import Path; from portmoe.record.writers import Writers\n"
        f"writers = Writers(Path({str(tmp_path)!r}), 60, 2)\n"
        "writers.step({'step': 0, 'loss': 1.0})\n"
        "print(sorted({'tensorboard', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_training_goes_on_with_a_note_where_tensorboard_is_broken(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    shown = write(tmp_path, range(5), queue=2)
    assert shown.count("no TensorBoard events") == 1
    assert "pip install" in shown
    assert steps_of(tmp_path) == list(range(5))


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    code = (
        "from pathlib import Path; from portmoe.record.writers import Writers\n"
        f"writers = Writers(Path({str(tmp_path)!r}), 60, 100)\n"
        "for step in range(50): writers.step({'step': step, 'loss': 1.0})\n"
        "print('end')"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert steps_of(tmp_path) == list(range(50))


def test_text_the_console_cannot_show_is_replaced():
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding="ascii"), 10)
    console.note("1 ≤ 2 · ok")
    assert raw.getvalue() == b"1 ? 2 ? ok\n"
