from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from pyarrow import fs

from cluster.errors import DataError
from cluster.storage import (
    checksum,
    complete_file,
    open_filesystem,
    publish_folder,
    remove_folder,
    write_atomic,
    write_json,
)


def test_local_paths_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    filesystem, path = open_filesystem("a/b.parquet")
    assert isinstance(filesystem, fs.LocalFileSystem)
    assert path == str(tmp_path / "a/b.parquet")
    assert open_filesystem(f"file://{tmp_path}/x")[1] == f"{tmp_path}/x"
    monkeypatch.setenv("HOME", "/home/somebody")
    assert open_filesystem("~/x")[1] == "/home/somebody/x"


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(DataError, match=r"^ftp://host/x: cannot be opened"):
        open_filesystem("ftp://host/x")


def test_write_atomic_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_atomic(target, b"one")
    write_atomic(target, b"two")
    assert target.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [target]


def test_write_atomic_keeps_the_former_file_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "state"
    target.mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError, match="is a folder"):
        write_atomic(target, b"new")
    assert list(tmp_path.iterdir()) == [target]
    write_json(tmp_path / "kept.json", {"b": 1, "a": [2]})
    with pytest.raises(TypeError):
        write_json(tmp_path / "kept.json", {"b": object()})
    assert json.loads((tmp_path / "kept.json").read_text()) == {"a": [2], "b": 1}


def test_publish_folder(tmp_path: Path) -> None:
    temporary, final = tmp_path / "tmp", tmp_path / "v1"
    (temporary / "deep").mkdir(parents=True)
    (temporary / "deep" / "file").write_text("x")
    publish_folder(temporary, final)
    assert (final / "deep" / "file").read_text() == "x"
    assert not temporary.exists()


def test_publish_folder_never_replaces(tmp_path: Path) -> None:
    for name in ("tmp", "v1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        publish_folder(tmp_path / "tmp", tmp_path / "v1")
    assert (tmp_path / "v1" / "file").read_text() == "v1"


def test_remove_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_text("x")
    remove_folder(folder)
    remove_folder(folder)  # nothing there: nothing happens
    assert list(tmp_path.iterdir()) == []


def test_checksum(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc" * 1000)
    assert checksum(file) == "sha256:" + hashlib.sha256(b"abc" * 1000).hexdigest()


def half_written(target: Path) -> None:
    with complete_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_complete_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "figures"
    with complete_file(target) as temporary:
        temporary.write_text("all of it")
        assert not target.exists()
    with pytest.raises(RuntimeError):
        half_written(target)
    assert target.read_text() == "all of it"
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        half_written(tmp_path / "nowhere" / "file")
