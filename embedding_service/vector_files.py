"""Vectors that other programs have made, read in chunks: word2vec text and binary (gensim's too), and Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from cluster.errors import DataError
from embedding_service.exact import Float32
from embedding_service.keys import KeyType

_CHUNK_VALUES = 2**22
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class VectorFile:
    """A file of keys and vectors of `dim` numbers; `format` is told by its first bytes."""

    path: str
    format: Literal["text", "binary", "parquet"]
    dim: int
    begin: int = 0  # where the first record of word2vec's formats is
    gap: bool = False  # text: a space ends every line, as word2vec's own program writes it
    rows: int = 0  # at least; of word2vec's formats, whose first line says so

    @classmethod
    def open(cls, path: str | Path) -> VectorFile:
        """Raises DataError if it is none of the formats."""
        try:
            with open(path, "rb") as file:
                if file.read(4) == b"PAR1":
                    return cls(str(path), "parquet", _parquet_dim(str(path)))
                file.seek(0)
                return _word2vec(str(path), file)
        except OSError as error:
            raise DataError(error.strerror or str(error), file=str(path)) from None

    def chunks(self, key_type: KeyType) -> Iterator[tuple[pa.Array, Float32, int]]:
        """(keys: an int64 or large_string array [n], float32 [n, dim], rows left out), in the order of the file.

        Keys that cannot be of `key_type` are left out, and counted. Memory is that of some tens of MiB, whatever the
        file's size.
        Raises DataError for rows that are damaged, missing, or not made of numbers.
        """
        read = {"text": self._text, "binary": self._binary, "parquet": self._parquet}[self.format]
        row = 0
        for keys, vectors in read():
            bad = ~np.isfinite(vectors).all(axis=1)
            if bad.any():
                raise DataError(
                    "has a nan or infinite number in its vector", file=self.path, row=row + int(bad.argmax())
                )
            row += len(vectors)
            try:
                yield _typed(keys, vectors, key_type)
            except pa.ArrowException as error:
                raise DataError(f"has keys that cannot be read: {error}", file=self.path) from None
        if row < self.rows:
            raise DataError(f"ends after {row:,} of {self.rows:,} rows: the file is cut off", file=self.path)

    def _text(self) -> Iterator[tuple[pa.Array, Float32]]:
        names = ["key", *(str(i) for i in range(self.dim)), *["end"] * self.gap]
        types = {"key": pa.large_binary(), "end": pa.large_binary()} | {str(i): pa.float32() for i in range(self.dim)}
        try:
            with csv.open_csv(
                self.path,
                csv.ReadOptions(skip_rows=1, column_names=names, block_size=_CHUNK_BYTES, use_threads=False),
                csv.ParseOptions(delimiter=" ", quote_char=False, double_quote=False),
                csv.ConvertOptions(column_types=types, null_values=[], check_utf8=False),
            ) as reader:
                for batch in reader:
                    columns = [batch.column(str(i)).to_numpy(zero_copy_only=False) for i in range(self.dim)]
                    yield batch.column("key"), np.stack(columns, axis=1)
        except pa.ArrowInvalid as error:
            raise DataError(f"is not word2vec's text format throughout: {error}", file=self.path) from None

    def _binary(self) -> Iterator[tuple[pa.Array, Float32]]:
        size = 4 * self.dim
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            data, row = b"", 0
            while True:
                more = file.read(max(_CHUNK_BYTES, 4 * size))
                data += more
                keys, vectors, place = [], [], 0
                while (space := data.find(b" ", place)) >= 0 and space + 1 + size <= len(data):
                    keys.append(data[place:space].lstrip(b"\n"))
                    vectors.append(data[space + 1 : space + 1 + size])
                    place = space + 1 + size
                if keys:
                    found = np.frombuffer(b"".join(vectors), "<f4").reshape(-1, self.dim)
                    yield pa.array(keys, pa.large_binary()), found.astype(np.float32, copy=False)
                data, row = data[place:], row + len(keys)
                if not more:
                    break
        if data.strip(b"\n"):
            raise DataError("ends in the middle of a vector: the file is cut off", file=self.path, row=row)

    def _parquet(self) -> Iterator[tuple[pa.Array, Float32]]:
        try:
            yield from self._parquet_batches()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"is not a readable Parquet file: {error}", file=self.path) from None

    def _parquet_batches(self) -> Iterator[tuple[pa.Array, Float32]]:
        row = 0
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(max(1, _CHUNK_VALUES // self.dim), columns=["key", "vector"]):
                lists = batch.column("vector")
                if not pa.types.is_fixed_size_list(lists.type):
                    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
                    wrong = np.flatnonzero(lengths != self.dim)
                    if len(wrong):
                        problem = f"has a vector of {lengths[wrong[0]]} numbers, the first one has {self.dim}"
                        raise DataError(problem, file=self.path, row=row + int(wrong[0]))
                flat = lists.flatten()
                if lists.null_count or flat.null_count:
                    raise DataError("a vector, or a number in one, is null", file=self.path)
                row += len(lists)
                vectors = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
                yield batch.column("key"), vectors.reshape(-1, self.dim)


def _parquet_dim(path: str) -> int:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if not {"key", "vector"} <= set(schema.names):
                raise DataError(f"needs the columns `key` and `vector`; it has {', '.join(schema.names)}", file=path)
            if schema.names.count("key") + schema.names.count("vector") > 2:
                raise DataError("has a column `key` or `vector` twice", file=path)
            if not _is_key(schema.field("key").type):
                raise DataError(f"column `key` is {schema.field('key').type}; expected integers or text", file=path)
            found = schema.field("vector").type
            is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
            if not is_list or not pa.types.is_floating(found.value_type):
                raise DataError(f"column `vector` is {found}; expected lists of floats", file=path)
            if pa.types.is_fixed_size_list(found) and found.list_size:
                return int(found.list_size)
            first = next(file.iter_batches(1, columns=["vector"]), None)
            if first is None or not first.column(0)[0].is_valid or not len(first.column(0)[0]):
                raise DataError("has no vector in its first row", file=path)
            return len(first.column(0)[0])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"is not a readable Parquet file: {error}", file=path) from None


def _is_key(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    return any(test(kind) for test in (*tests, pa.types.is_large_binary))


def _word2vec(path: str, file: IO[bytes]) -> VectorFile:
    header = file.readline(64).split()
    if len(header) != 2 or not all(part.isdigit() for part in header) or int(header[1]) < 1:
        raise DataError(
            "is neither Parquet nor word2vec's format, whose first line is the number of rows and the dimension",
            file=path,
        )
    rows, dim, begin = int(header[0]), int(header[1]), file.tell()
    line = file.readline(64 * (dim + 64))
    parts = line.rstrip(b"\r\n").split(b" ")
    gap = len(parts) == dim + 2 and parts[-1] == b""
    if line.endswith(b"\n") and len(parts) == dim + 1 + gap and all(map(_is_number, parts[1 : dim + 1])):
        return VectorFile(path, "text", dim, begin, gap, rows)
    return VectorFile(path, "binary", dim, begin, rows=rows)


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _typed(keys: pa.Array, vectors: Float32, key_type: KeyType) -> tuple[pa.Array, Float32, int]:
    """The rows whose key can be of `key_type`, and how many others there are."""
    if pa.types.is_dictionary(keys.type):
        keys = keys.dictionary_decode()
    if pa.types.is_large_binary(keys.type) or pa.types.is_binary(keys.type):
        keys = _text_of(keys)
    wanted = pa.int64() if key_type == "int64" else pa.large_string()
    fits = pc.is_valid(keys)
    if key_type == "int64" and pa.types.is_uint64(keys.type):
        fits = pc.fill_null(pc.less_equal(keys, pa.scalar(2**63 - 1, pa.uint64())), False)
    elif key_type == "int64" and not pa.types.is_integer(keys.type):
        fits = _is_int64(keys.cast(pa.large_string()))
    left_out = len(keys) - int(pc.sum(fits).as_py() or 0)
    if left_out:
        keys, vectors = keys.filter(fits), vectors[fits.to_numpy(zero_copy_only=False)]
    return keys.cast(wanted), vectors, left_out


def _is_int64(texts: pa.Array) -> pa.Array:
    """Which of `texts` are integers of 64 bits; only those of 19 digits have to be looked at one by one."""
    short = pc.fill_null(pc.match_substring_regex(texts, "^-?[0-9]{1,18}$"), False)
    long = pc.fill_null(pc.match_substring_regex(texts, "^-?[0-9]{19}$"), False)
    if not pc.any(long).as_py():
        return short
    known = texts.filter(long).to_pylist()
    long = pc.replace_with_mask(long, long, pa.array([-(2**63) <= int(text) < 2**63 for text in known]))
    return pc.or_(short, long)


def _text_of(keys: pa.Array) -> pa.Array:
    """Bytes as text; null where they are none."""
    try:
        return keys.cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.array([_decoded(key) for key in keys.to_pylist()], pa.large_string())


def _decoded(key: bytes) -> str | None:
    try:
        return key.decode()
    except UnicodeDecodeError:
        return None
