"""word2vec text and binary as gensim reads them, and Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gensim.models import KeyedVectors

from cluster.errors import DataError
from embedding_service.exact import ArrayVectors
from embedding_service.interchange import write_parquet, write_word2vec
from tests.embedding_service.artifacts import vocabulary


@pytest.fixture(params=["string", "int64"])
def keys(request: pytest.FixtureRequest) -> list[Any]:
    return ["os.path.join", "é", "日本", "a_b", '"'] if request.param == "string" else [5, -3, 10**18, 0, 7]


@pytest.fixture
def vectors() -> ArrayVectors:
    values = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32)
    values[0, :4] = [1e-40, -0.0, 3.4e38, 1e-7]
    return ArrayVectors(values)


@pytest.mark.parametrize("binary", [False, True])
def test_gensim_loads_what_was_written(
    tmp_path: Path, keys: list[Any], vectors: ArrayVectors, binary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedding_service.interchange._CHUNK_VALUES", 600)  # several chunks
    path = tmp_path / "vectors.w2v"
    write_word2vec(path, vocabulary(keys), vectors, binary=binary)
    loaded = KeyedVectors.load_word2vec_format(str(path), binary=binary)
    assert loaded.index_to_key == [str(key) for key in keys]
    np.testing.assert_array_equal(loaded.vectors, vectors.array)
    assert [file.name for file in tmp_path.iterdir()] == ["vectors.w2v"]


def test_text_format_is_the_documented_one(tmp_path: Path) -> None:
    write_word2vec(tmp_path / "v.txt", vocabulary(["b", "a"]), ArrayVectors(np.array([[1, 0.5], [-2, 0]], np.float32)))
    assert (tmp_path / "v.txt").read_text() == "2 2\nb 1 0.5\na -2 0\n"


@pytest.mark.parametrize("key", ["two words", "new\nline", "no\u00a0break", "", "tab\t", "control\x85"])
@pytest.mark.parametrize("binary", [False, True])
def test_keys_that_the_format_cannot_hold_are_refused(tmp_path: Path, key: str, binary: bool) -> None:
    ones = ArrayVectors(np.ones((2, 2), np.float32))
    with pytest.raises(DataError, match="cannot tell where it ends; export Parquet instead") as info:
        write_word2vec(tmp_path / "v", vocabulary(["fine", key]), ones, binary=binary)
    assert repr(key) in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_parquet_holds_keys_counts_and_vectors(
    tmp_path: Path, keys: list[Any], vectors: ArrayVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedding_service.interchange._CHUNK_VALUES", 600)
    items = vocabulary(keys)
    write_parquet(tmp_path / "v.parquet", items, vectors)
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 300)
    assert table.column("key").to_pylist() == keys
    assert table.column("count").to_pylist() == items.counts.tolist()
    np.testing.assert_array_equal(np.array(table.column("vector").to_pylist(), np.float32), vectors.array)
    assert [file.name for file in tmp_path.iterdir()] == ["v.parquet"]


def test_the_unknown_row_is_left_out_and_misfits_are_refused(tmp_path: Path) -> None:
    three = ArrayVectors(np.arange(6, dtype=np.float32).reshape(3, 2))
    write_word2vec(tmp_path / "v.txt", vocabulary(["a", "b"], unknown="row"), three)
    write_parquet(tmp_path / "v.parquet", vocabulary(["a", "b"], unknown="row"), three)
    assert (tmp_path / "v.txt").read_text() == "2 2\na 0 1\nb 2 3\n"
    assert pq.read_table(tmp_path / "v.parquet").num_rows == 2
    for write in (write_word2vec, write_parquet):
        with pytest.raises(DataError, match="3 vectors do not belong to 1 keys"):
            write(tmp_path / "x", vocabulary(["a"]), three)


@pytest.mark.parametrize("write", [write_word2vec, write_parquet])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, write: Any) -> None:
    one = ArrayVectors(np.ones((1, 2), np.float32))
    with pytest.raises(FileNotFoundError, match="there is no such folder") as missing:
        write(tmp_path / "none" / "v", vocabulary(["a"]), one)
    assert missing.value.filename == str(tmp_path / "none")
    with pytest.raises(IsADirectoryError) as folder:
        write(tmp_path, vocabulary(["a"]), one)
    assert folder.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
