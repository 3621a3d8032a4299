"""The bulk form without JSON: query vectors as one Arrow IPC stream, keys and scores as another.

For 1024 vectors of 64 numbers, reading and writing JSON takes longer than the search; the numbers of an Arrow stream
are there as they come.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedding_service.http_schema import Problem


def read_vectors(body: bytes, dim: int, max_rows: int) -> npt.NDArray[np.float32]:
    """The column `vector`, fixed_size_list<float32>[dim], of a stream's record batches: float32 [n, dim], n >= 1.

    Raises Problem: 400 for a damaged or compressed stream, other columns or types, null, nan or infinite values and no
    rows; 413 for more than `max_rows`.
    """
    try:
        parts = list(_parts(body, dim, max_rows))
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise Problem(400, "invalid_arrow", f"the body is not a valid Arrow IPC stream: {told}") from None
    if not parts:
        raise _refused("the stream has no rows: ask at least one query")
    vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise _refused(f"`vector`: row {int(np.argmin(finite))} holds nan or an infinity")
    return vectors


def write_results(
    keys: pa.Array, scores: npt.NDArray[np.float32], lengths: npt.NDArray[np.int64], metadata: Mapping[str, str]
) -> bytes:
    """A stream of n rows `keys` list<int64 | string> and `scores` list<float32>; `metadata` in the schema.

    keys and scores [sum of lengths] of n queries, lengths int64 [n].
    """
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    ends = pa.array(offsets)
    values = keys.cast(pa.string()) if pa.types.is_large_string(keys.type) else keys
    columns = [pa.ListArray.from_arrays(ends, values), pa.ListArray.from_arrays(ends, pa.array(scores))]
    batch = pa.record_batch(columns, ["keys", "scores"]).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _parts(body: bytes, dim: int, max_rows: int) -> Iterator[npt.NDArray[np.float32]]:
    messages = iter(pa.ipc.MessageReader.open_stream(body))
    first = next(messages, None)
    if first is None or first.type != "schema":
        raise pa.ArrowInvalid("it does not begin with a schema")
    schema = pa.ipc.read_schema(first)
    _check_schema(schema, dim)
    rows = 0
    for message in messages:
        if message.type != "record batch":
            raise pa.ArrowInvalid(f"a {message.type} has no place in it")
        if _is_compressed(message.metadata.to_pybytes()):  # a small body could grow beyond all memory
            raise _refused("compressed record batches are not read here: write the stream without compression")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate()
        rows += batch.num_rows
        if rows > max_rows:
            text = f"more than {max_rows} queries in one request, which is the limit: send several"
            raise Problem(413, "batch_too_large", text)
        column = batch.column(0)
        values = column.flatten()
        if column.null_count or values.null_count:
            raise _refused("`vector`: there are nulls")
        if batch.num_rows:
            yield values.to_numpy().reshape(-1, dim)


def _check_schema(schema: pa.Schema, dim: int) -> None:
    wanted = f"one column `vector` of fixed_size_list<float32>[{dim}]"
    if schema.names != ["vector"]:
        names = ", ".join(f"`{name[:50]}`" for name in schema.names[:5]) or "none"
        raise _refused(f"the stream must have {wanted}; its columns: {names}")
    type_ = schema.field(0).type
    if not pa.types.is_fixed_size_list(type_) or (type_.value_type, type_.list_size) != (pa.float32(), dim):
        raise _refused(f"the stream must have {wanted}; its column is {str(type_)[:100]}")


def _is_compressed(metadata: bytes) -> bool:
    """Whether the flatbuffer of a record batch's message has the field `compression` (the fourth of RecordBatch)."""

    def field(table: int, number: int) -> int:
        """Where a field of the table is, 0 if it is not there."""
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        size = struct.unpack_from("<H", metadata, vtable)[0]
        place = struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return table + place if place else 0

    header = field(struct.unpack_from("<I", metadata)[0], 2)  # the third field of Message
    record_batch = header + struct.unpack_from("<I", metadata, header)[0]
    return field(record_batch, 3) != 0


def _refused(message: str) -> Problem:
    return Problem(400, "invalid_request", message)
