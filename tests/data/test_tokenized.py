"""Folders of tokenized files: what is read, and what is said when one is broken."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from portmoe.data.sources.tokenized import TokenizedFile, open_folder
from portmoe.errors import ConfigError

KEY = "data.train_folder"


def write(path: Path, samples: list[list[int]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"tokens": tokens}).encode() + b"\n" for tokens in samples]
    path.write_bytes(b"".join(lines))
    offsets = np.cumsum([0, *map(len, lines[:-1])])
    write_meta(path, [(offset, len(tokens)) for offset, tokens in zip(offsets, samples, strict=True)])
    return path


def write_meta(path: Path, rows: list) -> None:
    with Path(f"{path}.meta").open("wb") as file:
        np.save(file, rows)


def test_samples_come_back_and_short_ones_are_left_out(tmp_path):
    path = write(tmp_path / "a.bin", [[1, -2, 3], [4], [5, 6], [], [7, 8, 9, 10]])
    file = TokenizedFile(path, KEY, min_length=2)
    assert file.lengths.tolist() == [3, 2, 4]
    assert file.lengths.dtype == np.int64
    assert [file[i].tolist() for i in range(len(file))] == [[1, -2, 3], [5, 6], [7, 8, 9, 10]]
    assert file[2].dtype == np.int64
    assert TokenizedFile(path, KEY).lengths.tolist() == [3, 1, 2, 4]  # one without a token never counts


def test_tokens_that_are_not_positive_are_not_learned(tmp_path):
    sample = TokenizedFile(write(tmp_path / "a.bin", [[5, 0, -7, 8]]), KEY).sample(0)
    assert sample.tokens_T.tolist() == [5, 0, 7, 8]
    assert sample.learned_T.tolist() == [True, False, False, True]


def test_a_last_line_without_a_line_end_is_read(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b'{"tokens": [1, 2]}')
    write_meta(path, [(0, 2)])
    assert TokenizedFile(path, KEY)[0].tolist() == [1, 2]


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_maps_no_files_is_read_from(tmp_path, monkeypatch, code):
    def refused(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("mmap.mmap", refused)
    file = TokenizedFile(write(tmp_path / "a.bin", [[1, 2, 3], [4, 5]]), KEY)
    assert [file[i].tolist() for i in range(2)] == [[1, 2, 3], [4, 5]]
    (tmp_path / "b.bin").write_bytes(b"nonsense, four\n")
    write_meta(tmp_path / "b.bin", [(0, 4)])
    with pytest.raises(ConfigError, match="line 1 of"):
        TokenizedFile(tmp_path / "b.bin", KEY)[0]


def test_files_come_in_order_with_the_type_their_path_says(tmp_path):
    names = ["code/b.bin", "cn/z/en.bin", "cn/a.bin", "en/part-0.bin", "x/train_code-1.bin", "x/encode.bin"]
    for token, name in enumerate(names, start=1):
        write(tmp_path / name, [[token]])
    write(tmp_path / "x/ignored.txt", [[99]])
    found = [(file[0].item(), file.type_id) for file in open_folder(str(tmp_path), KEY, min_length=0)]
    assert found == [(3, 1), (2, 1), (1, 2), (4, 0), (6, 0), (5, 2)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"tokens": [1, 2', "line 2"),
        (b'{"tokens": [1, 2.5]}', "integers"),
        (b'{"tokens": [1, 99999999999999999999]}', "integers"),
        (b'{"tokens": [[1], [2]]}', "integers"),
        (b'{"tokens": [[1], 2]}', "integers"),
        (b'{"tokens": "12"}', "integers"),
        (b'{"text": [1, 2]}', "KeyError"),
        (b"[1, 2]", "integers"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"[" * 100000, "RecursionError"),
        (b"", "line 2"),
        (b'{"tokens": [1, 2, 3]}', "has 3 tokens, and its .meta says 2"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, said):
    first = b'{"tokens": [5]}\n'
    path = tmp_path / "a.bin"
    path.write_bytes(first + line + b"\n")
    write_meta(path, [(0, 1), (len(first), 2)])
    file = TokenizedFile(path, KEY)
    assert file[0].tolist() == [5]
    with pytest.raises(ConfigError, match="line 2 of") as error:
        file[1]
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert str(error.value).startswith(KEY)
    assert len(str(error.value)) < 600 + len(str(path))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([0, 2], "two integer columns"),
        ([(0.0, 2.0)], "two integer columns"),
        ([(0, 2, 3)], "two integer columns"),
        ([(0, 2), (400, 2)], "does not have"),
        ([(-1, 2)], "does not have"),
        ([(0, 10**15)], "does not have"),
        (np.array([(0, 2**64 - 2)], dtype=np.uint64), "does not have"),
        (np.array([(0, "x")], dtype=object), "not a numpy array file"),
    ],
)
def test_a_meta_file_that_does_not_fit_is_named(tmp_path, rows, said):
    path = write(tmp_path / "a.bin", [[1, 2]])
    write_meta(path, rows)
    with pytest.raises(ConfigError, match=said) as error:
        TokenizedFile(path, KEY)
    assert "a.bin.meta" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04N.", b"\x93NUMPY\x01\x00\xff\xff{"])
def test_a_meta_file_that_is_no_array_is_named(tmp_path, content):
    path = write(tmp_path / "a.bin", [[1, 2]])
    Path(f"{path}.meta").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.bin\.meta is not a numpy array file"):
        TokenizedFile(path, KEY)


def test_a_missing_meta_file_is_named(tmp_path):
    path = write(tmp_path / "a.bin", [[1, 2]])
    Path(f"{path}.meta").unlink()
    with pytest.raises(ConfigError, match=r"a\.bin\.meta does not exist"):
        TokenizedFile(path, KEY)


def test_a_file_that_goes_away_or_is_emptied_is_named(tmp_path):
    for name in ("gone", "emptied"):
        path = write(tmp_path / f"{name}.bin", [[1, 2]])
        file = TokenizedFile(path, KEY)
        path.unlink() if name == "gone" else path.write_bytes(b"")
        with pytest.raises(ConfigError, match=f"{name}.bin cannot be read"):
            file[0]


def test_an_empty_file_has_no_sample(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"")
    write_meta(path, [])
    assert len(TokenizedFile(path, KEY)) == 0


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, said in [
        ("missing", "does not exist"),
        ("long" * 100, "does not exist"),
        ("file", "is not a folder"),
        ("empty", "holds no .bin file"),
    ]:
        with pytest.raises(ConfigError, match=said) as error:
            open_folder(str(tmp_path / name), KEY, min_length=0)
        assert f"{KEY}='{tmp_path / name}'" in str(error.value)
