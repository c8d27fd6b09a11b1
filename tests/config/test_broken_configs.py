"""Configs that are wrong: always one ConfigError naming the key, never another exception."""

import math
import random
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import portmoe
from portmoe.config import Config
from portmoe.errors import ConfigError


def leaves(model=Config, prefix=""):
    """(dotted path, annotation) of every key that is no section."""
    for name, field in model.model_fields.items():
        options = [field.annotation, *get_args(field.annotation)]
        sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if sections:
            yield from leaves(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name, field.annotation


def accepts(annotation, kind):
    """Whether a value of ``kind`` is of a type the annotation names."""
    if get_origin(annotation) in (Union, UnionType):
        return any(accepts(option, kind) for option in get_args(annotation))
    if get_origin(annotation) is Literal:
        return any(type(value) is kind for value in get_args(annotation))
    base = get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
    return base is kind or (base is float and kind is int)


LEAVES = dict(leaves())
TEXT = [key for key, kind in LEAVES.items() if accepts(kind, str)]
BOOLEAN = [key for key, kind in LEAVES.items() if accepts(kind, bool)]
NUMBER = [key for key, kind in LEAVES.items() if accepts(kind, float)]
INTEGER = [key for key, kind in LEAVES.items() if accepts(kind, int) and key not in NUMBER]
SECTIONS = sorted({key.rpartition(".")[0] for key in LEAVES} - {""})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all: a folder per test would take longer than the tests."""
    return tmp_path_factory.mktemp("broken")


def tree_with(key, value):
    *sections, name = key.split(".")
    tree = {name: value}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def refusal(folder, content, overrides=()):
    """The message ``content`` (a tree, text or bytes) is refused with."""
    path = folder / "broken.yaml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        portmoe.load_config(path, overrides)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert len(message) < 2500
    return message


def test_the_families_cover_the_config():
    assert len(LEAVES) > 90
    assert min(map(len, (TEXT, BOOLEAN, NUMBER, INTEGER, SECTIONS))) > 8


@pytest.mark.parametrize("key", LEAVES)
def test_a_section_where_a_value_belongs(key, folder):
    message = refusal(folder, tree_with(key, {"inner": 1}))
    assert f"{key} = {{'inner': 1}}: must be " in message


@pytest.mark.parametrize("key", sorted(LEAVES.keys() - set(TEXT)))
def test_text_where_there_is_none(key, folder):
    assert f"{key} = 'many'" in refusal(folder, tree_with(key, "many"))


@pytest.mark.parametrize("key", NUMBER + INTEGER)
def test_a_number_no_run_can_have(key, folder):
    for value in (math.nan, math.inf, -math.inf, 10**400, -(10**400), 10**39, "1"):
        message = refusal(folder, tree_with(key, value))
        assert f"{key} = " in message
        assert "must be" in message


@pytest.mark.parametrize("key", INTEGER)
def test_a_fraction_where_an_integer_belongs(key, folder):
    assert f"{key} = 1.5: must be " in refusal(folder, tree_with(key, 1.5))


@pytest.mark.parametrize("key", sorted(LEAVES.keys() - set(NUMBER) - set(INTEGER)))
def test_a_number_where_there_is_none(key, folder):
    assert f"{key} = 7: must be " in refusal(folder, tree_with(key, 7))


@pytest.mark.parametrize("key", sorted(LEAVES.keys() - set(BOOLEAN)))
def test_a_boolean_where_there_is_none(key, folder):
    assert f"{key} = true: must be " in refusal(folder, tree_with(key, True))


@pytest.mark.parametrize("key", LEAVES)
def test_a_misspelt_key_names_the_right_one(key, folder):
    section, _, name = key.rpartition(".")
    wrong = f"{section}.{name}s".lstrip(".")
    message = refusal(folder, tree_with(wrong, 1))
    assert f"{wrong}: unknown key; did you mean " in message
    assert key in message


@pytest.mark.parametrize("section", SECTIONS)
def test_a_value_where_a_section_belongs(section, folder):
    for value in (5, "text", [1], True):
        assert f"{section} = " in refusal(folder, tree_with(section, value))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"top_k": 1}, "top_k: unknown key; that key is moe.top_k"),
        ({"model": {"top_k": 1}}, "model.top_k: unknown key; that key is moe.top_k"),
        ({"zero1": {"size": 1}}, "zero1: unknown key; that key is parallel.zero1"),
        ({"moe": {"topk": 1}}, "moe.topk: unknown key; did you mean moe.top_k?"),
        ({"optimizer": {}}, "optimizer: unknown key"),
        ({"model.num_layers": 1}, "model.num_layers: unknown key"),
        ({"moe": {"a.b": 1}}, "moe.a.b: unknown key; remove it; moe has top_k"),
        ({"": 1, ".": 1, ":": 1, "0.1": 1}, "4 problems"),
        ({"x" * 5000: 1}, "x" * 120 + ": unknown key"),
        (
            {"model": {"hidden_size": 130}},
            "model.hidden_size=130 must be a multiple of model.num_attention_heads",
        ),
        (
            {"model": {"hidden_size": 96}},
            "model.hidden_size=96 / model.num_attention_heads=32 = 3 must be even",
        ),
        (
            {"model": {"num_experts": 2}, "moe": {"top_k": 3}},
            "moe.top_k=3 must be at most model.num_experts=2",
        ),
        ({"model": {"first_k_dense_replace": 33}}, "model.first_k_dense_replace=33 must be at most"),
        ({"model": {"num_chunks": 2}}, "model.num_chunks=2 needs parallel.pipeline.size"),
        ({"model": {"dtype": "int8"}}, "model.dtype = 'int8': must be one of 'float32'"),
        ({"model": {"moe_type": "gshard"}}, "model.moe_type = 'gshard': must be one of 'GShard'"),
        ({"model": {"checkpoint": 1.5}}, "model.checkpoint = 1.5: must be true or false or a number"),
        ({"moe": {"noisy_gate_policy": "RSample"}}, "moe.noisy_gate_policy='RSample' cannot be combined"),
        (
            {"moe": {"noisy_gate_policy": "RSample", "use_fused_gating": False}},
            "moe.noisy_gate_policy='RSample' acts for moe.top_k=1 only",
        ),
        (
            {"moe": {"noisy_gate_policy": "Jitter"}, "model": {"moe_type": "MegaBlock"}},
            "moe.noisy_gate_policy='Jitter' acts with model.moe_type='GShard' only",
        ),
        ({"adam": {"lr": 1e-6}}, "lr_scheduler.eta_min=1e-05 must be at most adam.lr=1e-06"),
        ({"adam": {"adam_beta1": 1.0}}, "adam.adam_beta1 = 1.0: must be a number ≥ 0 and < 1"),
        ({"data": {"seq_len": 0}}, "data.seq_len = 0: must be an integer ≥ 1"),
        ({"data": {"total_steps": -1}}, "data.total_steps = -1: must be an integer ≥ 1"),
        (
            {"data": {"total_steps": None}},
            "data.total_steps=null and data.num_epochs=null leave open how long",
        ),
        ({"data": {"num_epochs": 0}}, "data.num_epochs = 0: must be an integer ≥ 1"),
        (
            {"data": {"packing": "best"}},
            "data.packing = 'best': must be one of 'benchmark', 'cut', 'whole', 'none'",
        ),
        (
            {"ckpt": {"keep_best": True, "enable_save_ckpt": True}},
            "ckpt.enable_save_ckpt=true with data.valid_every=0; set both, or ckpt.keep_best to false",
        ),
        ({"data": {"skip_batches": "3-x"}}, "data.skip_batches: '3-x' is neither a step nor a range"),
        ({"data": {"skip_batches": "9-3"}}, "data.skip_batches: '9-3' ends before it begins"),
        ({"data": {"skip_batches": 3}}, "data.skip_batches = 3: must be text; put it in quotes"),
        ({"data": {"micro_bsz": "2"}}, "write it without quotes"),
        (
            {"data": {"global_batch_size": 600, "max_global_batch_size": 512}},
            "data.global_batch_size=600 is over data.max_global_batch_size=512",
        ),
        ({"grad_scaler": {"max_scale": 2}}, "grad_scaler.fp16.initial_scale=65536 ≤ grad_scaler.max_scale=2"),
        (
            {"parallel": {"weight": {"size": 2}}},
            "parallel.weight.size=2 acts only with parallel.tensor.mode='isp'",
        ),
        (
            {"parallel": {"tensor": {"size": 2}, "sequence": {"size": 2}}},
            "parallel.tensor.size=2 and parallel.sequence.size=2: ranks share layers or split the tokens",
        ),
        (
            {"parallel": {"sequence": {"size": 3}}},
            "must be a multiple of parallel.sequence.size=3, which splits the sequence",
        ),
        ({"parallel": {"sequence": {"size": 0}}}, "parallel.sequence.size = 0: must be"),
        ({"parallel": {"tensor": {"size": 3}}}, "must be a multiple of parallel.tensor.size=3"),
        ({"parallel": {"tensor": {"mode": "sp"}}}, "parallel.tensor.mode = 'sp': must be one of 'mtp'"),
        ({"parallel": {"pipeline": {"size": 33}}}, "model.num_layers=32 is fewer than the stages"),
        (
            {"parallel": {"expert": {"size": 3}}},
            "model.num_experts=4 must be a multiple of parallel.expert.size=3",
        ),
        ({"run": {"directory": ""}}, "run.directory = ''"),
        ({"run": {"seed": 2**32}}, "run.seed = 4294967296"),
        (
            {"ckpt": {"load_ckpt_info": {"content": ["all", "x"]}}},
            "ckpt.load_ckpt_info.content = ['all', 'x']",
        ),
        ({"ckpt": {"load_ckpt_info": {"paht": "x"}}}, "did you mean ckpt.load_ckpt_info.path?"),
        ({"ops": {"disable": [["nested"]]}}, "ops.disable = [['nested']]: must be a list, each entry text"),
    ],
)
def test_mistakes_by_hand(tree, expected, folder):
    assert expected in refusal(folder, tree)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("---\n", "the file is empty"),
        ("[]", "the top level is []"),
        ("just text", "the top level is 'just text'"),
        ("42", "the top level is 42"),
        ("a: [", "line 1"),
        ("a: 'unclosed", "line 1"),
        ("a:\n\t- 1", "line 2"),
        ("@x: 1", "line 1"),
        (
            "JOB_NAME: a\nmodel: {}\nJOB_NAME: b",
            "line 3, column 1: the key 'JOB_NAME' was already given on line 1",
        ),
        ("model:\n  num_layers: 1\n  num_layers: 2\n", "the key 'num_layers' was already given on line 2"),
        ("1: 2", "the key 1 must be text"),
        ("null: 2", "the key None must be text"),
        ("true: 2", "the key True must be text"),
        ("? [a, b]\n: 1", "must be text"),
        ("? {a: b}\n: 1", "must be text"),
        ("<<: {JOB_NAME: x}", "<<: unknown key"),
        ("a: &x 1\nb: *x", "anchors and aliases are not allowed"),
        ("a: *never", "anchors and aliases are not allowed"),
        ("&x a: *x", "anchors and aliases are not allowed"),
        ("a: &a [lol]\nb: &b [*a,*a]\nc: &c [*b,*b]", "anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.system [ls]", "tags"),
        ("a: !!binary aGk=", "tags"),
        ("!custom {}", "tags"),
        ("[" * 100_000, "nested more than 10 levels deep"),
        ("{a: " * 50_000, "nested more than 10 levels deep"),
        ("\n".join("  " * depth + "a:" for depth in range(300)), "nested more than 10 levels deep"),
        ("- " * 1000, "nested more than 10 levels deep"),
        ("a: 1\n---\nb: 2", "document"),
        ("%YAML 3.0\n---\na: 1", "line 1"),
        ("adam: {lr: " + "9" * 5000 + "}", "integer"),
        ('JOB_NAME: "a\\0b"', "cannot be printed"),
        ('JOB_NAME: "\\uD800"', "cannot be printed"),
        ('JOB_NAME: "\\e[31m"', "cannot be printed"),
        ("adam: {lr: 1e400}", "adam.lr = inf"),
        ("data: {seq_len: 2026-01-31}", "data.seq_len = '2026-01-31'"),
        ("moe: {use_tutel: yes}", "moe.use_tutel = 'yes': must be true or false"),
        ("JOB_NAME: " + "x" * 300_000, "larger than 256 KiB"),
        (b"\x00", "character #x0 at position 0"),
        (b"JOB_NAME: a\x00b", "character #x0"),
        (b"JOB_NAME: \xff\xfe", "byte 0xff at position 10 is not UTF-8"),
        ("JOB_NAME: é".encode("latin-1"), "is not UTF-8"),
        ("JOB_NAME: a".encode("utf-16"), "is not UTF-8"),
        (random.Random(0).randbytes(5000) + b"\xff", "broken.yaml"),
        (b"\x80\x04\x95pickle", "is not UTF-8"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_files_that_are_no_config(text, expected, folder):
    message = refusal(folder, text)
    assert expected in message
    assert "broken.yaml" in message


@pytest.mark.parametrize(
    "override",
    [
        "moe.top_k",
        "=1",
        "",
        ".=1",
        "moe.=1",
        ".top_k=1",
        "moe..top_k=1",
        "moe.top_k.deeper=1",
        "JOB_NAME.x=1",
        "moe.topk=1",
        "top_k=1",
        "moe.top_k=two",
        "moe.top_k=",
        "moe=1",
        "moe.top_k=[",
        "moe.top_k=&a 1",
        "moe.top_k=!!int 1",
        "moe.top_k={a: 1, a: 2}",
        "moe.top_k=" + "[" * 5000,
        "moe.top_k=" + "9" * 5000,
        "moe.top_k=\x00",
        "." * 5000 + "=1",
        "a." * 3000 + "b=1",
        "\udcff=1",
        "JOB_NAME=\udcff",
    ],
    ids=lambda value: repr(value)[:40],
)
def test_overrides_that_cannot_be_applied(override, folder):
    assert "--set" in refusal(folder, "JOB_NAME: x", [override])


def test_every_problem_is_listed_on_its_own_line(folder):
    tree = {"moe": {"top_k": "two", "extra": 1}, "adam": {"lr": -1}, "data": {"seq_len": None}}
    first, *lines = refusal(folder, tree).splitlines()
    assert first.endswith("4 problems")
    assert sorted(line.split()[0].rstrip(":") for line in lines) == [
        "adam.lr",
        "data.seq_len",
        "moe.extra",
        "moe.top_k",
    ]


def test_contradictions_are_listed_together(folder):
    tree = {"parallel": {"tensor": {"size": 3}, "pipeline": {"size": 40}}}
    assert "2 problems" in refusal(folder, tree)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/nonexistent/x.yaml", "not found"),
        ("/", "is a folder"),
        ("/dev/null", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        ("/proc/self/mem", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("a\0b", "NUL"),
        ("", "is a folder"),
        ("../tiny_moe4", "not found"),
        ("__init__.py", "not found"),
        ("tiny_moe4.yml", "not found"),
        (
            "tiny_mixtrall",
            r"not found; did you mean tiny_mixtral\?; give the path of a YAML file or a packaged name: 7b",
        ),
        ("\udcff", "not found"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_paths_without_a_config(path, expected, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=expected):
        portmoe.load_config(path)


def test_a_file_without_permission(folder, monkeypatch):
    path = folder / "secret.yaml"
    path.write_text("{}")

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # root, who may run the tests, can read any file
    with pytest.raises(ConfigError, match=r"secret.yaml.*Permission denied"):
        portmoe.load_config(path)


fuzz = settings(max_examples=150, deadline=None, derandomize=True)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates()
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*Config.model_fields, "size", "lr"]) | st.text(max_size=5), inner, max_size=4
        )
    ),
    max_leaves=12,
)


def load_or_refuse(path, overrides=()):
    with suppress(ConfigError):
        portmoe.load_config(path, overrides)


@fuzz
@given(content=st.binary(max_size=200))
def test_any_bytes(content, folder):
    path = folder / "any.yaml"
    path.write_bytes(content)
    load_or_refuse(path)


@fuzz
@given(content=st.text(alphabet="{}[]:,-&*!|>'\"%@`#?~ \n\tab01.e_<=", max_size=60))
def test_any_text(content, folder):
    path = folder / "any.yaml"
    path.write_text(content)
    load_or_refuse(path)


@fuzz
@given(tree=trees)
def test_any_tree(tree, folder):
    path = folder / "any.yaml"
    path.write_text(yaml.safe_dump(tree))
    load_or_refuse(path)


@fuzz
@given(
    override=st.text(max_size=30)
    | st.builds("{}={}".format, st.sampled_from(sorted(LEAVES)), st.text(max_size=20))
)
def test_any_override(override):
    load_or_refuse("tiny_moe4", [override])
