from __future__ import annotations

import io
import itertools

import pyarrow as pa
import pytest

from trainers.ipc_messages import DamagedStream, read_batches, read_schema, scan_messages


def lists(indices: list[list[int]], words: list[str]) -> pa.RecordBatch:
    flat = pa.DictionaryArray.from_arrays(pa.array(list(itertools.chain(*indices)), pa.int32()), pa.array(words))
    offsets = pa.array([0, *itertools.accumulate(len(one) for one in indices)], pa.int32())
    return pa.record_batch({"number": pa.array(range(len(indices))), "items": pa.ListArray.from_arrays(offsets, flat)})


def encode(batches: list[pa.RecordBatch], kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    make = pa.ipc.new_file if kind == "ipc_file" else pa.ipc.new_stream
    with make(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def read(data: bytes, wanted: list[int], columns: tuple[int, ...] = (0, 1)) -> list[list[dict[str, object]]]:
    index = scan_messages(io.BytesIO(data), len(data))
    return [batch.to_pylist() for _, batch in read_batches(io.BytesIO(data), index, wanted, columns)]


GROWING = [lists([[0, 1], []], ["a", "b"]), lists([[1]], ["a", "b"]), lists([[2, 0], [3]], ["a", "b", "c", "d"])]
REPLACED = [*GROWING, lists([[0, 1]], ["z", "y"]), lists([[1]], ["z", "y"]), lists([[2]], ["z", "y", "x"])]


@pytest.mark.parametrize(
    ("batches", "kind", "options"),
    [
        (REPLACED, "ipc_stream", {"emit_dictionary_deltas": True}),
        (REPLACED, "ipc_stream", {}),
        (REPLACED, "ipc_stream", {"emit_dictionary_deltas": True, "compression": "zstd"}),
        (REPLACED, "ipc_stream", {"unify_dictionaries": False, "use_legacy_format": True}),
        (GROWING, "ipc_file", {"emit_dictionary_deltas": True}),
        (GROWING[:2], "ipc_file", {"compression": "lz4"}),
    ],
)
def test_any_subset_of_batches_reads_as_in_the_whole_stream(
    batches: list[pa.RecordBatch], kind: str, options: dict[str, object]
) -> None:
    """Every batch sees the dictionaries that were in force when it was written: additions and replacements."""
    data = encode(batches, kind, **options)
    index = scan_messages(io.BytesIO(data), len(data))
    assert index.rows.tolist() == [batch.num_rows for batch in batches]
    assert read_schema(io.BytesIO(data), index) == batches[0].schema
    expected = [batch.to_pylist() for batch in batches]
    for size in range(1, len(batches) + 1):
        for wanted in itertools.combinations(range(len(batches)), size):
            assert read(data, list(wanted)) == [expected[i] for i in wanted]


@pytest.mark.parametrize("columns", [(0,), (1,)])
def test_only_the_wanted_columns_are_decoded(columns: tuple[int, ...]) -> None:
    name = ("number", "items")[columns[0]]
    got = read(encode(REPLACED, "ipc_stream", emit_dictionary_deltas=True), [2, 4], columns)
    assert got == [[{name: row[name]} for row in REPLACED[i].to_pylist()] for i in (2, 4)]


def test_metadata_larger_than_the_first_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.ipc_messages._FIRST_READ_BYTES", 16)
    data = encode(REPLACED, "ipc_stream")
    assert read(data, [0, 5]) == [REPLACED[i].to_pylist() for i in (0, 5)]


def test_a_stream_without_end_mark_is_complete() -> None:
    data = encode(GROWING[:1], "ipc_stream")
    assert read(data[:-8], [0]) == [GROWING[0].to_pylist()]


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff\x10\x00\x00\x00" + b"\x7f" * 16, b"\x10\x00\x00\x00" + b"\x00" * 16]
)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(DamagedStream, match="no Arrow message"):
        scan_messages(io.BytesIO(data), len(data))
