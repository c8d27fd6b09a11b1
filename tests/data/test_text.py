"""Own text made into a data set: every byte once, whole or not there, and what training then reads."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import portmoe as package
from portmoe.cli.main import run as portmoe
from portmoe.data.sources.opened import open_samples
from portmoe.data.sources.tokenized import open_folder
from portmoe.data.text import documents, make, parts
from portmoe.errors import ConfigError

TEXT = "It was a dark night.\nВ лесу 森林 темно.\n" * 40 + "no line end at the end"


def samples(folder):
    return [
        list(file[index])
        for file in open_folder(str(folder), "data.train_folder", 0)
        for index in range(len(file))
    ]


def text_of(tokens):
    return bytes(token - 3 for token in tokens if token >= 3).decode("utf-8")


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def made(book, out, **options):
    settings = {"tokenizer": "bytes", "jobs": 1, "progress": lambda *told: None}
    return make.make([book], folder=out, **(settings | options))


@pytest.mark.parametrize("part", [7, 64, 1000, 10**6])
@pytest.mark.parametrize("piece", [5, 1 << 16])
def test_every_byte_is_there_once_however_the_file_is_divided(book, tmp_path, monkeypatch, part, piece):
    monkeypatch.setattr(parts, "PART", part)
    monkeypatch.setattr(documents, "PIECE", piece)
    told = made(book, tmp_path / "set")
    found = samples(tmp_path / "set")
    assert "".join(map(text_of, found)) == TEXT
    assert (told.samples, told.tokens) == (len(found), sum(map(len, found)))
    assert told.vocabulary == 259 > max(map(max, found))


def test_a_document_a_line_ends_with_the_token_for_it_and_long_ones_become_several(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "LONGEST", 4)
    lines = tmp_path / "code-pages.jsonl"
    lines.write_text('{"text": "abcdef", "id": 1}\n\n{"text": "é"}\n', encoding="utf-8")
    made(lines, tmp_path / "set")
    byte = [3 + value for value in b"abcdef"]
    assert samples(tmp_path / "set") == [byte[:4], [*byte[4:], 1], [3 + 0xC3, 3 + 0xA9, 1]]
    assert open_folder(str(tmp_path / "set"), "data.train_folder", 0)[0].type_id == 2  # code, by its name


def test_a_tokenizer_of_the_hubs_format(tmp_path, book):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = {"[UNK]": 0, "dark": 1, "night": 2, "<end>": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    told = made(book, tmp_path / "set", tokenizer=str(folder))
    (tokens,) = samples(tmp_path / "set")
    assert (told.vocabulary, told.end) == (4, 3)
    assert (tokens.count(1), tokens.count(2), tokens[-1]) == (40, 40, 3)


def test_what_was_stopped_goes_on_and_is_not_there_before_it_is_whole(book, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 200)
    out, write, written = tmp_path / "set", make.write_part, []

    def stops_at_the_third(part, target, tokenizer):
        if len(written) == 2:
            (target.with_name(f"{target.name}.partial")).write_text("half")
            raise KeyboardInterrupt
        written.append(part)
        write(part, target, tokenizer)

    monkeypatch.setattr(make, "write_part", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        made(book, out)
    assert not out.exists()
    monkeypatch.setattr(make, "write_part", write)
    told = made(book, out)
    assert told.already == 2
    assert "".join(map(text_of, samples(out))) == TEXT
    assert not list(out.glob("*.partial"))
    assert made(book, out).tokens == told.tokens  # nothing is left to do


def test_a_folder_made_of_something_else_is_left_alone(book, tmp_path, monkeypatch):
    out = tmp_path / "set"
    made(book, out)
    before = sorted(path.stat().st_mtime_ns for path in out.iterdir())
    book.write_text("other text")
    with pytest.raises(ConfigError, match="was not made from these files"):
        made(book, out)
    assert sorted(path.stat().st_mtime_ns for path in out.iterdir()) == before


def test_several_processes_make_the_same_set(book, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 1500)
    made(book, tmp_path / "one")
    made(book, tmp_path / "two", jobs=2)
    assert samples(tmp_path / "one") == samples(tmp_path / "two")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"caf\xe9\n", "is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 of"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 of"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, said, capsys):
    (tmp_path / name).write_bytes(content)
    command = ["data", "tokenize", str(tmp_path), "--tokenizer", "bytes", "-o", str(tmp_path / "set")]
    assert portmoe(command) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_training_on_a_folder_of_text_names_the_command_and_its_result_is_read(book, capsys, tmp_path):
    config = package.load_config("tiny_moe4", [f"data.train_folder={book.parent}"])
    with pytest.raises(
        ConfigError, match=r"data.tokenizer.*portmoe data tokenize .*--tokenizer bytes -o FOLDER"
    ):
        open_samples(config, "train")
    out = tmp_path / "my set"
    assert (
        portmoe(["data", "tokenize", str(book), "--tokenizer", "bytes", "-o", str(out), "--jobs", "1"]) == 0
    )
    told = capsys.readouterr().out
    assert f"--set 'data.train_folder={out}' --set model.vocab_size=259" in told


@pytest.mark.parametrize(
    ("tokenizer", "said"), [("nowhere", "does not exist"), ("book.txt", "is no tokenizer.json")]
)
def test_a_tokenizer_that_is_none_is_named(book, tmp_path, monkeypatch, tokenizer, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        made(book, tmp_path / "set", tokenizer=tokenizer)


def test_other_files_than_text_in_a_folder_are_passed_over_and_read_where_they_are_named(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "settings.json").write_text('{"depth": 3}')
    (tmp_path / "texts" / "a.txt").write_text("abc")
    array = tmp_path / "array.json"
    array.write_text('[{"text": "d"},\n {"text": "e"}]')
    progress = {"jobs": 1, "progress": lambda *told: None}
    told = make.make([tmp_path / "texts", array], "bytes", tmp_path / "set", **progress)
    assert (told.files, told.samples) == (2, 3)
    assert sorted(map(text_of, samples(tmp_path / "set"))) == ["abc", "d", "e"]
