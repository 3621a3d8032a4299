"""Every format is read as it was written, whole or in chunks, and damage is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from embedding_service import vector_files
from embedding_service.interchange import write_parquet, write_word2vec
from embedding_service.keys import Vocabulary
from embedding_service.vector_files import VectorFile
from embedding_service.vectors import VectorSet

VECTORS = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
FORMATS = ("text", "binary", "parquet")


def keys_of(kind: str) -> Vocabulary:
    keys = pa.array(np.arange(300) * 7 - 5) if kind == "int64" else pa.array([f"wörd-{i}" for i in range(300)])
    return Vocabulary(keys, np.arange(300)[::-1])


def write(path: Path, keys: Vocabulary, form: str) -> Path:
    vectors = VectorSet(VECTORS, None, "fp32")
    if form == "parquet":
        write_parquet(path, keys, vectors)
    else:
        write_word2vec(path, keys, vectors, binary=form == "binary")
    return path


def read(path: Path, key_type: Any = "string") -> dict[Any, list[float]]:
    found: dict[Any, list[float]] = {}
    for keys, vectors, _ in VectorFile.open(path).chunks(key_type):
        assert len(keys) == len(vectors)
        found |= zip(keys.to_pylist(), vectors.tolist(), strict=True)
    return found


@pytest.mark.parametrize("chunk", [64, 1 << 20])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("key_type", ["int64", "string"])
def test_what_was_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, key_type: Any, chunk: int
) -> None:
    monkeypatch.setattr(vector_files, "_CHUNK_BYTES", max(chunk, 4096) if form == "text" else chunk)
    monkeypatch.setattr(vector_files, "_CHUNK_VALUES", chunk)
    keys = keys_of(key_type)
    path = write(tmp_path / "vectors", keys, form)
    assert VectorFile.open(path).format == form
    assert read(path, key_type) == dict(zip(keys.keys.to_pylist(), VECTORS.tolist(), strict=True))


def test_as_word2vecs_own_program_writes_them(tmp_path: Path) -> None:
    """It ends text lines with a space and a newline, and binary records with a newline."""
    text, binary = tmp_path / "text", tmp_path / "binary"
    text.write_bytes(b"2 4\n</s> 0.5 1 -2 4e-1 \nab 1 2 3 4 \n")
    numbers = [np.array(row, "<f4").tobytes() for row in ([0.5, 1, -2, 0.4], [1, 2, 3, 4])]
    binary.write_bytes(b"2 4\n</s> " + numbers[0] + b"\nab " + numbers[1] + b"\n")
    assert read(text) == read(binary)
    assert read(text)["ab"] == [1, 2, 3, 4]


def test_keys_that_no_vocabulary_can_have_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"4 1\n12 1\nx 2\n\xff\xfe 3\n-7 4\n")
    assert read(path, "int64") == {12: [1.0], -7: [4.0]}
    assert read(path, "string") == {"12": [1.0], "x": [2.0], "-7": [4.0]}


def test_keys_of_19_digits_are_read_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    most, least = 2**63 - 1, -(2**63)
    path = tmp_path / "text"
    path.write_text(f"5 1\n{most} 1\n{least} 2\n{most + 1} 3\nx 4\n12345678901234567890 5\n")
    ((keys, vectors, left_out),) = VectorFile.open(path).chunks("int64")
    assert (keys.to_pylist(), vectors.tolist(), left_out) == ([most, least], [[1.0], [2.0]], 3)
    unsigned = pa.table({"key": pa.array([7, 2**63], pa.uint64()), "vector": [[1.0], [2.0]]})
    pq.write_table(unsigned, tmp_path / "parquet")
    ((keys, vectors, left_out),) = VectorFile.open(tmp_path / "parquet").chunks("int64")
    assert (keys.to_pylist(), vectors.tolist(), left_out) == ([7], [[1.0]], 1)


def test_a_damaged_parquet_page_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "vectors", keys_of("int64"), "parquet")
    content = bytearray(path.read_bytes())
    content[8:2000] = bytes(1992)
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not a readable Parquet file") as error:
        read(path, "int64")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"what is this\n", "neither Parquet nor word2vec's format"),
        (b"", "neither Parquet nor word2vec's format"),
        (b"2 2\na 1 2\nb 1\n", "not word2vec's text format throughout"),
        (b"2 2\na 1 2\nb 1 x\n", "not word2vec's text format throughout"),
        (b"2 2\na 1 2\nb 1 nan\n", "row 1: has a nan or infinite"),
        (b"2 2\na " + bytes(8) + b"b " + bytes(7), "row 1: ends in the middle of a vector"),
        (b"3 2\na " + bytes(8) + b"b " + bytes(8), "ends after 2 of 3 rows"),
        (b"3 2\na 1 2\nb 1 2\n", "ends after 2 of 3 rows"),
    ],
)
def test_damage_is_told(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "vectors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (pa.table({"word": ["a"]}), "needs the columns `key` and `vector`; it has word"),
        (pa.table({"key": ["a"], "vector": ["b"]}), "expected lists of floats"),
        (pa.table({"key": ["a", "b"], "vector": [[1.0, 2.0], [1.0]]}), "row 1: has a vector of 1 numbers"),
        (pa.table({"key": ["a"], "vector": [[1.0, None]]}), "is null"),
        (pa.table({"key": [1.5], "vector": [[1.0]]}), "column `key` is double; expected integers or text"),
        (pa.table({"key": [["a"]], "vector": [[1.0]]}), "column `key` is list"),
        (pa.table({"key": ["a"], "vector": pa.array([[]], pa.list_(pa.float32()))}), "no vector in its first row"),
    ],
)
def test_parquet_of_another_kind_is_told(tmp_path: Path, table: pa.Table, problem: str) -> None:
    pq.write_table(table, tmp_path / "vectors")
    with pytest.raises(DataError, match=problem):
        read(tmp_path / "vectors")


def test_parquet_with_lists_of_one_length(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": [3, 4], "vector": [[1.0, 2.0], [3.0, 4.0]]}), tmp_path / "vectors")
    assert read(tmp_path / "vectors", "int64") == {3: [1.0, 2.0], 4: [3.0, 4.0]}
