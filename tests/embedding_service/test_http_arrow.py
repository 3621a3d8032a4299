"""Arrow streams in and out: what is read is what was written, and what is damaged is refused in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from embedding_service.http_arrow import read_vectors, write_results
from embedding_service.http_schema import Problem

DIM = 3
VECTORS = np.random.default_rng(0).standard_normal((5, DIM)).astype(np.float32)


def column(vectors: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])


def stream(columns: Sequence[pa.Array], names: Sequence[str] = ("vector",), *, compression: str | None = None) -> bytes:
    """A stream of one record batch."""
    return stream_of([pa.record_batch(list(columns), list(names))], compression)


def stream_of(batches: Sequence[pa.RecordBatch], compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def refusal(body: bytes, max_rows: int = 100) -> tuple[int, str, str]:
    with pytest.raises(Problem) as caught:
        read_vectors(body, DIM, max_rows)
    return caught.value.status, caught.value.code, str(caught.value)


def test_vectors_are_read_as_written() -> None:
    np.testing.assert_array_equal(read_vectors(stream([column(VECTORS)]), DIM, 5), VECTORS)


def test_batches_and_slices_are_joined() -> None:
    batch = pa.record_batch([column(VECTORS)], ["vector"])
    body = stream_of([batch.slice(1, 2), batch.slice(0, 0), batch.slice(3)])
    np.testing.assert_array_equal(read_vectors(body, DIM, 5), VECTORS[1:])


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ([pa.array([1.0])], ["vector"], "its column is double"),
        ([column(VECTORS[:, :2])], ["vector"], "its column is fixed_size_list<item: float>[2]"),
        ([column(VECTORS.astype(np.float64))], ["vector"], "its column is fixed_size_list<item: double>[3]"),
        ([column(VECTORS)], ["v"], "its columns: `v`"),
        ([column(VECTORS)] * 2, ["vector", "vector"], "its columns: `vector`, `vector`"),
        ([], [], "its columns: none"),
    ],
)
def test_other_columns_are_refused(columns: list[pa.Array], names: list[str], message: str) -> None:
    wanted = f"the stream must have one column `vector` of fixed_size_list<float32>[3]; {message}"
    assert refusal(stream(columns, names)) == (400, "invalid_request", wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    vectors = VECTORS.copy()
    vectors[3, 1] = value
    assert refusal(stream([column(vectors)])) == (400, "invalid_request", "`vector`: row 3 holds nan or an infinity")


@pytest.mark.parametrize("values", [[[1.0, 2.0, 3.0], None], [[1.0, None, 3.0]]])
def test_nulls_are_refused(values: list[object]) -> None:
    nulls = pa.array(values, pa.list_(pa.float32(), DIM))
    assert refusal(stream([nulls])) == (400, "invalid_request", "`vector`: there are nulls")


def test_no_rows_and_too_many() -> None:
    assert refusal(stream([column(VECTORS[:0])]))[:2] == (400, "invalid_request")
    assert refusal(stream([column(VECTORS)]), 4) == (
        413,
        "batch_too_large",
        "more than 4 queries in one request, which is the limit: send several",
    )


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_stream_is_refused_before_it_grows(compression: str) -> None:
    zeros = column(np.zeros((50_000, DIM), np.float32))
    status, code, message = refusal(stream([zeros], compression=compression))
    assert (status, code) == (400, "invalid_request")
    assert "without compression" in message


@pytest.mark.parametrize("body", [b"", b"{}", b'{"vectors": [[1, 2, 3]]}', b"\xff" * 64, b"ARROW1\0\0"])
def test_what_is_no_stream_is_refused(body: bytes) -> None:
    status, code, message = refusal(body)
    assert (status, code) == (400, "invalid_arrow")
    assert message.startswith("the body is not a valid Arrow IPC stream: ")


def test_a_damaged_stream_is_refused_or_read_but_breaks_nothing() -> None:
    rng = np.random.default_rng(1)
    whole = stream([column(VECTORS)])
    statuses = []
    for turn in range(2000):
        body = bytearray(whole[: rng.integers(1, len(whole))] if turn % 2 else whole)
        for place in rng.integers(0, len(body), rng.integers(1, 4)):
            body[place] = rng.integers(256)
        try:
            read_vectors(bytes(body), DIM, 100)
        except Problem as problem:
            statuses.append(problem.status)
    assert set(statuses) <= {400, 413}
    assert len(statuses) > 1000


@pytest.mark.parametrize("keys", [pa.array([7, 8, -9]), pa.array(["a", "é", ""], pa.large_string())])
def test_results_are_written_a_row_per_query(keys: pa.Array) -> None:
    scores = np.array([3, 2, 1], np.float32)
    written = write_results(keys, scores, np.array([2, 0, 1]), {"version": "v7"})
    table = pa.ipc.open_stream(written).read_all()
    assert table.schema.metadata == {b"version": b"v7"}
    value = pa.int64() if pa.types.is_int64(keys.type) else pa.string()
    assert table.schema.types == [pa.list_(value), pa.list_(pa.float32())]
    flat = keys.to_pylist()
    assert table.to_pydict() == {"keys": [flat[:2], [], flat[2:]], "scores": [[3.0, 2.0], [], [1.0]]}
