"""The command line: help without torch, exit codes, one message for every mistake."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

import portmoe
from portmoe.cli import main as command
from portmoe.errors import BackendError, ConfigError, TrainingError

PORTMOE = [sys.executable, "-m", "portmoe"]


def start(*arguments, **options):
    return subprocess.run([*PORTMOE, *arguments], capture_output=True, timeout=60, check=False, **options)


def imports_torch(*arguments):
    code = "import sys; from portmoe.cli.main import run; run(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["config"],
        ["train", "--config", "missing.yaml"],
        ["train", "--backend", "nosuch"],
        ["train", "--nproc", "3"],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported_for(arguments):
    assert not imports_torch(*arguments)


def test_the_installed_script_answers():
    script = Path(sys.executable).with_name("portmoe")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert portmoe.__version__ in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--config", "missing.yaml"], b"missing.yaml"),
        (["train", "--config", b"\xff\xfe.yaml"], b"not found"),
        (["train", "--set", b"\xff=1"], b"--set"),
        (["train", "--set", "moe.top_k=9"], b"moe.top_k=9"),
        (["train", "--backend", "nosuch"], b"'nosuch' is not registered"),
        (["train", "--nproc", "0"], b"--nproc"),
        (["nosuch"], b"nosuch"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_mistakes_in_a_real_process(arguments, expected):
    result = start(*arguments)
    assert result.returncode == 2
    assert expected in result.stderr
    assert b"Traceback" not in result.stderr
    assert result.stdout == b""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_a_character_still_shows_the_text(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = start("train", "--set", "adam.lr=-1", env=environment)
    assert result.returncode == 2
    assert b"adam.lr = -1: must be a number" in result.stderr
    result = start("config", "--set", "JOB_NAME=≥", env=environment)
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_reader_that_goes_away_leaves_no_traceback():
    result = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m portmoe config | true"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert result.stderr.strip() == b""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config"],
        ["train", "--config", "/"],
        ["train", "--config", ""],
        ["train", "--config", "a\0b"],
        ["train", "--config", "x" * 5000],
        ["train", "--config", "tiny_moe4", "--config", "missing"],
        ["train", "--set"],
        ["train", "--set", "moe.top_k"],
        ["train", "--set", "moe.topk=1"],
        ["train", "--set", "moe.top_k=[[[["],
        ["train", "--set", "data.global_batch_size=7"],
        ["train", "--set", "parallel.tensor.size=2"],
        ["train", "--set", "parallel.pipeline.size=2"],
        ["train", "--set", "trainer.engine=deepspeed", "--set", "parallel.expert.size=2"],
        ["train", "--set", "parallel.expert.size=2"],
        ["train", "--backend"],
        ["train", "--backend", ""],
        ["train", "--backend", "CPU"],
        ["train", "--backend", "cpu "],
        ["train", "--backend", "../cpu"],
        ["train", "--backend", "\udcff"],
        ["train", "--nproc", "two"],
        ["train", "--nproc", "-1"],
        ["train", "--nproc", "1.5"],
        ["train", "--nproc", "9" * 500],
        ["train", "--nproc", "3"],
        ["train", "--max-restarts", "-1"],
        ["train", "--max-restarts", "x"],
        ["train", "--launcher", "mpirun"],
        ["train", "--world-size", "4"],
        ["train", "--dry-run", "--world-size", "0"],
        ["train", "--dry-run", "--world-size", "3"],
        ["train", "--dry-run", "--config", "7b_moe4", "--world-size", "64"],
        ["train", "--dry-run", "--set", "ops.disable=[nosuch.op]"],
        ["train", "--dry-runs"],
        ["train", "--name", "a", "--out", "b"],
        ["train", "tiny_moe4"],
        ["config", "--config", "missing"],
        ["config", "--set", "x=1"],
        ["config", "--backend", "cpu"],
        ["config", "extra"],
        ["check-env", "--backend", "nosuch"],
        ["check-env", "--nosuch"],
        ["trian"],
        ["--nosuch"],
        ["--config", "tiny_moe4"],
        [""],
        ["\udcff"],
    ],
    ids=lambda value: repr(value)[:60],
)
def test_mistakes_end_with_exit_code_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.run(arguments) == 2
    captured = capsys.readouterr()
    assert "rror: " in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert list(tmp_path.iterdir()) == []


def group_raising(error):
    @click.command()
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ConfigError("a.b=1 is wrong"), 2, "error: a.b=1 is wrong\n"),
        (BackendError("no device"), 3, "error: no device\n"),
        (TrainingError("lost rank 3"), 4, "error: lost rank 3\n"),
        (click.UsageError("usage"), 2, "Error: usage\n"),
        (KeyboardInterrupt(), 130, "\n"),
        (click.Abort(), 130, ""),
        (SystemExit(4), 4, ""),
    ],
)
def test_the_exit_code_of_every_kind_of_error(error, code, shown, capsys, monkeypatch):
    monkeypatch.setattr(command, "cli", group_raising(error))
    try:
        ended = command.run([])
    except SystemExit as exit_:
        ended = exit_.code
    assert ended == code
    assert capsys.readouterr().err.endswith(shown)


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(command, "cli", group_raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        command.run([])


def test_an_interrupt_ends_a_real_process_quietly():
    code = "import os, signal; from portmoe.cli import main; import portmoe.cli.config as c\n"
    # A shell starts what runs in its background with interrupts ignored, and children inherit that.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "c.load_config = lambda *_: os.kill(os.getpid(), signal.SIGINT) or __import__('time').sleep(9)\n"
    code += "import atexit, sys; sys.argv = ['portmoe', 'config']\n"
    code += "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))  # again, while Python clears up\n"
    code += "main.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert result.returncode in (130, -signal.SIGINT)
    assert result.stderr.strip() == b""


def test_the_resolved_config_can_be_loaded_again(tmp_path, capsys):
    assert command.run(["config", "--config", "7b_moe4", "--set", "moe.top_k=1"]) == 0
    path = tmp_path / "resolved.yaml"
    path.write_text(capsys.readouterr().out)
    assert portmoe.load_config(path) == portmoe.load_config("7b_moe4", ["moe.top_k=1"])


def test_keys_without_effect_are_noted_beside_the_resolved_config(capsys):
    assert command.run(["config", "--set", "cudnn_benchmark=true"]) == 0
    assert "note: cudnn_benchmark = true has no effect" in capsys.readouterr().err


def test_a_vocabulary_too_small_for_the_dummy_data_ends_training_and_no_other_work(capsys):
    small = ["--config", "7b_moe4", "--set", "model.vocab_size=512"]
    assert command.run(["train", *small, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "model.vocab_size=512 is too small: with data.seq_len=2048 the dummy data" in error
    assert command.run(["config", *small]) == 0


def test_nproc_inside_of_a_launch_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert command.run(["train", "--nproc", "2"]) == 2
    assert "one of 2 processes that a launcher has started would make 2 runs" in capsys.readouterr().err
