"""Vector sets in formats that other programs read: word2vec text and binary (gensim's `KeyedVectors`), and Parquet.

All three are written chunk by chunk, into a temporary file that is renamed when it is complete. The unknown row has no
key and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.storage import complete_file
from embedding_service.exact import Float32, Vectors
from embedding_service.keys import Vocabulary

_CHUNK_VALUES = 2**20
_SPACE = r"[\s\v\p{Z}\p{Cc}]"


def write_word2vec(path: str | Path, keys: Vocabulary, vectors: Vectors, *, binary: bool = False) -> None:
    """Write the word2vec format: a line `rows dim`, then per key `key v1 v2 ...` as text, or `key ` and float32 bytes.

    gensim: `KeyedVectors.load_word2vec_format(path, binary=binary)`. Text has the fewest digits that give back the same
    float32. Rows are in the vocabulary's order, most frequent first; int64 keys become their decimal text.

    Raises DataError for a key that is empty or holds white space or a control character: the format cannot tell where
    such a key ends.
    """
    _check_fit(keys, vectors)
    with complete_file(path) as temporary, open(temporary, "wb") as out:
        out.write(f"{len(keys.keys)} {vectors.dim}\n".encode())
        for texts, chunk in _keyed_chunks(keys, vectors):
            _check_words(texts)
            out.write(_records(texts, chunk) if binary else _lines(texts, chunk))


def write_parquet(path: str | Path, keys: Vocabulary, vectors: Vectors) -> None:
    """Write Parquet with the columns `key` (int64 or string), `count` and `vector` (fixed-size list of float32).

    Rows are in the vocabulary's order; a row group holds about a million components.
    """
    _check_fit(keys, vectors)
    schema = pa.schema(
        [
            pa.field("key", pa.int64() if keys.key_type == "int64" else pa.string(), nullable=False),
            pa.field("count", pa.int64(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), vectors.dim), nullable=False),
        ]
    )
    with complete_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        start = 0
        for texts, chunk in _keyed_chunks(keys, vectors, as_text=False):
            counts = keys.counts[start : start + len(chunk)]
            start += len(chunk)
            lists = pa.FixedSizeListArray.from_arrays(pa.array(chunk.ravel()), vectors.dim)
            writer.write_batch(
                pa.record_batch([texts.cast(schema.field("key").type), pa.array(counts), lists], schema=schema)
            )


def _check_fit(keys: Vocabulary, vectors: Vectors) -> None:
    if vectors.rows not in (len(keys.keys), len(keys.keys) + 1):
        raise DataError(f"{vectors.rows} vectors do not belong to {len(keys.keys)} keys")


def _keyed_chunks(keys: Vocabulary, vectors: Vectors, *, as_text: bool = True) -> Iterator[tuple[pa.Array, Float32]]:
    for start, chunk in vectors.chunks(max(1, _CHUNK_VALUES // vectors.dim)):
        part = keys.keys.slice(start, len(chunk))
        yield part.cast(pa.large_string()) if as_text else part, chunk[: len(part)]


def _check_words(texts: pa.Array) -> None:
    bad = pc.or_(pc.match_substring_regex(texts, _SPACE), pc.equal(pc.binary_length(texts), 0))
    first = pc.index(bad, True).as_py()
    if first >= 0:
        raise DataError(
            f"key {texts[first].as_py()!r} is empty or holds white space, and the word2vec format cannot tell where it "
            "ends; export Parquet instead"
        )


def _lines(texts: pa.Array, chunk: Float32) -> bytes:
    """`key v1 v2 ...` and a newline for each row."""
    numbers = pa.array(chunk.ravel()).cast(pa.string())
    rows = pa.ListArray.from_arrays((np.arange(len(chunk) + 1) * chunk.shape[1]).astype(np.int32), numbers)
    lines = pc.binary_join_element_wise(texts.cast(pa.string()), pc.binary_join(rows, " "), " ")
    return b"".join(line.encode() + b"\n" for line in lines.to_pylist())


def _records(texts: pa.Array, chunk: Float32) -> bytes:
    """`key ` and the bytes of its little-endian float32 row, for each row."""
    rows = chunk.astype("<f4", copy=False)
    return b"".join(key.encode() + b" " + row.tobytes() for key, row in zip(texts.to_pylist(), rows, strict=True))
