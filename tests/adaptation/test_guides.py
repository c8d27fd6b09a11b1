"""What the guides claim: commands parse, config keys exist, implementations are offered, figures hold."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from guides import FOLDER, LANGUAGES, ROOT, blocks, commands, pages

import portmoe
from portmoe.accelerator.discovery import load
from portmoe.cli.main import cli
from portmoe.config import Config
from portmoe.config.messages import sections
from portmoe.config.read import load_config, parse_config
from portmoe.ops import OPERATIONS

IDS = [path.relative_to(FOLDER).as_posix() for path in pages()]
COMMANDS = sorted({command for page in pages() for command in commands(page)})
OURS = [command for command in COMMANDS if re.search(r"(^|\s)portmoe(\s|$)", command)]
SECTIONS = dict(sections())
KEY = re.compile(rf"`((?:{'|'.join(name for name in SECTIONS if name)})\.(?!json)\w+)(?:[:=][^`]*)?`")
IMPLEMENTATION = re.compile(rf"\b((?:{'|'.join(OPERATIONS)})\.\w+)\b")
ROW = re.compile(r"^\| [^|]*GB[^|]* \| (\d+) \| ([^|]*) \| ([\d.]+ GiB) \|$", re.MULTILINE)


def inline_code(page):
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def parsed(arguments, command=cli, name="portmoe"):
    """Parse as click does, without running anything; the innermost command's context."""
    context = command.make_context(name, list(arguments))
    rest = [*context.protected_args, *context.args] if isinstance(command, click.Group) else []
    if not rest:
        return context
    inner = command.get_command(context, rest[0])
    assert inner is not None, f"no command {rest[0]!r}"
    return parsed(rest[1:], inner, rest[0])


def test_there_is_something_to_check():
    assert len(OURS) > 10
    assert len(pages()) == 11


def parsed_command(command, folder, monkeypatch):
    """Parse a command line that starts portmoe, by whatever launcher, and the config it names."""
    monkeypatch.chdir(folder)
    words = shlex.split(command.partition(" || ")[0])
    start = next(place for place, word in enumerate(words) if Path(word).name == "portmoe")
    arguments = words[start + 1 :]
    for word in arguments:
        if word.startswith("runs/"):
            (folder / word).mkdir(parents=True, exist_ok=True)  # what an earlier command made
    if {"-h", "--help"} & set(arguments):
        return
    context = parsed(arguments)
    overrides = [
        key for key in context.params.get("overrides", ()) if "from_pretrained" not in key
    ]  # no folder is here
    if "name" in context.params and "overrides" in context.params:
        load_config(context.params["name"], overrides)


@pytest.mark.parametrize("command", OURS)
def test_command_lines_parse(command, tmp_path, monkeypatch):
    parsed_command(command, tmp_path, monkeypatch)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "benchmarks/" in command])
def test_scripts_exist(command):
    script = next(word for word in shlex.split(command) if word.startswith("benchmarks/"))
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("page", pages(), ids=IDS)
def test_config_keys_exist(page):
    named = {match[1] for match in KEY.finditer(inline_code(page))}
    for key in named:
        section, _, name = key.rpartition(".")
        assert key in SECTIONS or name in SECTIONS[section].model_fields, key
    for block in blocks(page):
        if block.language == "yaml":
            assert isinstance(parse_config(block.text, page.name), Config)


def test_the_key_pattern_sees_keys():
    assert KEY.findall("`run.seed` `model.moe_type: X` `parallel.zero1.fsdp=true` `ops.json`") == [
        "run.seed",
        "model.moe_type",
        "parallel.zero1.fsdp",
    ]


@pytest.mark.parametrize("backend", ["npu", "xpu", "cuda"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_implementations_are_offered(backend, language):
    """No list here of what a page must name: a page may leave out what every backend has."""
    text = (FOLDER / language / f"{backend}.md").read_text("utf-8")
    offered = {f"{i.op}.{i.name}" for i in load(backend).ops.implementations()}
    named = set(IMPLEMENTATION.findall(text))
    assert named
    assert named <= offered
    fused = {name for name in offered if name.rpartition(".")[2].startswith(("npu", "triton"))}
    gating = {name for name in fused if name.startswith("topk_gating.npu")}  # a gap, described in words
    assert fused - gating <= named


def test_both_languages_have_the_same_commands():
    for page in sorted((FOLDER / "en").iterdir()):
        other = FOLDER / "zh" / page.name
        assert blocks(page) == blocks(other)


def rows(language):
    for ranks, settings, together in ROW.findall((FOLDER / language / "README.md").read_text("utf-8")):
        yield int(ranks), re.findall(r"`([^`]+)`", settings), together


def test_the_tables_of_layouts_are_the_same():
    assert len(list(rows("en"))) == 12
    assert list(rows("en")) == list(rows("zh"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_figures_are_those_of_the_dry_run(monkeypatch):
    from portmoe.planning import dry_run

    monkeypatch.setattr(dry_run, "_communication", lambda config, layout: iter(()))  # not in the tables
    for ranks, settings, together in rows("en"):
        config = portmoe.load_config("7b_moe4", ["data.global_batch_size=512", *settings])
        text = dry_run.dry_run(config, "7b_moe4", "cpu", ranks)
        assert f"together {together}," in text, (ranks, settings)


NOT_HERE = ("torchrun ", "srun ", "--config 7b_moe4 --backend cpu --nproc 8", "benchmarks/gpu.sh")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_common_guide_runs_from_its_first_command_to_its_last(tmp_path):
    """In order, in one folder; left out is what needs many cards, and the benchmarks at 7B's shapes."""
    shutil.copy(ROOT / "tests" / "config" / "internevo" / "7B_MoE4.py", tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    lines = commands(FOLDER / "en" / "README.md")
    run = [line for line in lines if not any(part in line for part in NOT_HERE)]
    assert len(run) > 10
    for line in run:
        assert_runs(line, tmp_path)
    assert (tmp_path / "report" / "report.html").exists()
    assert (tmp_path / "compare.html").exists()
    assert (tmp_path / "mine.yaml").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_npu_guides_commands_train_on_the_simulated_device(tmp_path):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    lines = [line for line in commands(FOLDER / "en" / "npu.md") if "portmoe train" in line]
    assert len(lines) == 2
    for number, line in enumerate(lines):
        plugin = {"PYTHONPATH": str(ROOT / "tests" / "simulated" / "plugin")}
        short = f" --set data.total_steps=2 --set run.directory=runs/{number}"
        assert_runs(line + short, tmp_path, **plugin)
        record = json.loads((tmp_path / "runs" / str(number) / "ops.json").read_text())
        assert record["rms_norm"]["chosen"].startswith("npu") == (number == 0)


def assert_runs(line, folder, **variables):
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, line + done.stdout + done.stderr
