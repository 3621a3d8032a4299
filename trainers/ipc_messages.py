"""Random access to the record batches of an Arrow IPC stream or file, which are one format but for the file's footer.

A stream has no table of contents, so opening one walks its messages once and notes where every record batch lies and
how many rows it has. Only the messages' metadata is read, never a body. A batch is read later by handing Arrow a
stream spliced together of the schema, the dictionaries in force at that batch, and the batch.
"""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

FILE_MAGIC = b"ARROW1"
CONTINUATION = b"\xff\xff\xff\xff"
_FIRST_READ_BYTES = 4096  # holds the metadata of nearly every message, so that a message costs one read
_SCHEMA, _DICTIONARY, _RECORD_BATCH = 1, 2, 3  # MessageHeader of Arrow's Message.fbs


class DamagedStream(ValueError):
    """The bytes are not a complete Arrow IPC stream; `batch` is the record batch that is damaged, where known."""

    def __init__(self, problem: str, batch: int | None = None) -> None:
        super().__init__(problem)
        self.batch = batch


@dataclass(frozen=True)
class _Message:
    kind: int
    offset: int
    length: int  # prefix, metadata and body
    rows: int  # of a record batch
    dictionary: int  # id, of a dictionary batch
    delta: bool  # a dictionary batch that adds to the one before, in place of replacing it


@dataclass(frozen=True)
class MessageIndex:
    """Where the messages of one stream lie. Arrays are int64 [number of record batches]."""

    schema: _Message
    dictionaries: tuple[_Message, ...]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    seen_dictionaries: npt.NDArray[np.int64]  # how many of `dictionaries` count for this batch

    def in_force(self, seen: int) -> list[_Message]:
        """The dictionary messages that make up the dictionaries after the first `seen` of them."""
        parts: dict[int, list[_Message]] = {}
        for message in self.dictionaries[:seen]:
            if not message.delta:
                parts[message.dictionary] = []
            parts.setdefault(message.dictionary, []).append(message)
        return sorted(itertools.chain(*parts.values()), key=lambda message: message.offset)


def scan_messages(source: Any, size: int) -> MessageIndex:
    """The index of the IPC stream or IPC file `source` (a seekable binary file of `size` bytes).

    Raises DamagedStream if it is truncated or not Arrow IPC.
    """
    is_file = _read(source, 0, len(FILE_MAGIC)) == FILE_MAGIC
    begin, end = (8, _footer_start(source, size)) if is_file else (0, size)
    messages = []
    num_batches = 0
    while begin < end:
        message = _read_message(source, begin, end, num_batches)
        begin = message.offset + message.length
        if message.kind == 0:  # the end-of-stream mark
            break
        messages.append(message)
        num_batches += message.kind == _RECORD_BATCH
    if begin < end and not is_file:
        raise DamagedStream(f"has {end - begin} bytes after the end of the stream; put every stream in its own file")
    if not messages or messages[0].kind != _SCHEMA:
        raise DamagedStream("does not begin with a schema")
    dictionaries = tuple(message for message in messages if message.kind == _DICTIONARY)
    batches = [message for message in messages if message.kind == _RECORD_BATCH]
    seen = np.cumsum([message.kind == _DICTIONARY for message in messages])
    seen = seen[[message.kind == _RECORD_BATCH for message in messages]]
    if is_file:  # a file's dictionaries hold for all of its batches, before and after them
        seen = np.full(len(batches), len(dictionaries))
    offsets, lengths, rows = np.array([(m.offset, m.length, m.rows) for m in batches], np.int64).reshape(-1, 3).T
    return MessageIndex(messages[0], dictionaries, offsets, lengths, rows, seen.astype(np.int64))


def read_schema(source: Any, index: MessageIndex) -> pa.Schema:
    """The schema of the stream. Raises pa.ArrowException, OSError if it is damaged."""
    with pa.ipc.open_stream(pa.PythonFile(_Splice(source, [index.schema]), mode="r")) as reader:
        return reader.schema


def read_batches(
    source: Any, index: MessageIndex, batches: Sequence[int], columns: Sequence[int]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number, record batch) of the record batches numbered `batches`, with the top-level fields `columns` only.

    Holds one batch and the dictionaries at a time. Raises pa.ArrowException or OSError for damaged bytes, but
    does not look at values and offsets: `validate` does.
    """
    options = pa.ipc.IpcReadOptions(included_fields=sorted(columns), use_threads=False)
    for seen, group in itertools.groupby(batches, key=lambda batch: index.seen_dictionaries[batch]):
        wanted = list(group)
        bodies = [_Message(_RECORD_BATCH, int(index.offsets[b]), int(index.lengths[b]), 0, 0, False) for b in wanted]
        splice = _Splice(source, [index.schema, *index.in_force(int(seen)), *bodies])
        with pa.ipc.open_stream(pa.PythonFile(splice, mode="r"), options=options) as reader:
            for number in wanted:
                yield number, reader.read_next_batch()


class _Splice(io.RawIOBase):
    """A read-only file made of some messages of another, in the given order."""

    def __init__(self, source: Any, messages: Sequence[_Message]) -> None:
        super().__init__()
        self._source = source
        self._extents = [(message.offset, message.length) for message in reversed(messages)]

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer only at the end."""
        pieces = []
        while size and self._extents:
            offset, length = self._extents.pop()
            take = length if size < 0 else min(size, length)
            piece = _read(self._source, offset, take)
            if len(piece) < take:
                raise OSError("the file has become shorter")
            pieces.append(piece)
            if take < length:
                self._extents.append((offset + take, length - take))
            size = size if size < 0 else size - take
        return b"".join(pieces)


def _read(source: Any, offset: int, length: int) -> bytes:
    source.seek(offset)
    return bytes(source.read(length))


def _footer_start(source: Any, size: int) -> int:
    tail = _read(source, max(size - 10, 0), 10)
    (length,) = struct.unpack("<i", tail[:4]) if len(tail) == 10 else (0,)
    if tail[4:] != FILE_MAGIC or not 0 < length <= size - 18:
        raise DamagedStream("is a truncated Arrow file: it does not end in ARROW1")
    return size - 10 - int(length)


def _read_message(source: Any, offset: int, end: int, batch: int) -> _Message:
    """The message at `offset`; its kind is 0 for the end-of-stream mark."""
    head = _read(source, offset, min(_FIRST_READ_BYTES, end - offset))
    prefix = 8 if head[:4] == CONTINUATION else 4  # streams written before Arrow 0.15 have no continuation mark
    if len(head) < prefix:
        raise DamagedStream(f"ends inside record batch {batch}", batch)
    (metadata_length,) = struct.unpack_from("<i", head, prefix - 4)
    if metadata_length == 0:
        return _Message(0, offset, prefix, 0, 0, False)
    if not 0 < metadata_length <= end - offset - prefix:
        raise DamagedStream(f"ends inside record batch {batch}", batch)
    if len(head) < prefix + metadata_length:
        head = _read(source, offset, prefix + metadata_length)
    try:
        kind, rows, dictionary, delta, body = _parse_metadata(head[prefix : prefix + metadata_length])
    except struct.error:
        raise DamagedStream(f"holds bytes that are no Arrow message at byte {offset}", batch) from None
    if kind not in (_SCHEMA, _DICTIONARY, _RECORD_BATCH) or rows < 0 or body < 0:
        raise DamagedStream(f"holds bytes that are no Arrow message at byte {offset}", batch)
    length = prefix + metadata_length + body
    if offset + length > end:
        raise DamagedStream(f"ends inside record batch {batch}", batch)
    return _Message(kind, offset, length, rows, dictionary, delta)


def _parse_metadata(data: bytes) -> tuple[int, int, int, bool, int]:
    """(kind, rows, dictionary id, delta, body length) of a message's flatbuffer; see Arrow's format/Message.fbs."""
    message = _number("<I", data, 0)
    kind = _number("<B", data, _field(data, message, 1))
    header = _field(data, message, 2)
    body = _number("<q", data, _field(data, message, 3))
    if not header:
        return 0, 0, 0, False, body
    table = header + _number("<I", data, header)
    if kind == _DICTIONARY:
        identity, delta = _number("<q", data, _field(data, table, 0)), _number("<B", data, _field(data, table, 2))
        return kind, 0, identity, bool(delta), body
    return kind, _number("<q", data, _field(data, table, 0)) if kind == _RECORD_BATCH else 0, 0, False, body


def _field(data: bytes, table: int, index: int) -> int:
    """Where field `index` of the flatbuffer table at `table` lies; 0 if it is absent."""
    vtable = table - _number("<i", data, table) if table else 0
    slot = 4 + 2 * index
    if not 0 <= vtable <= len(data) or slot >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + slot)
    return table + int(offset) if offset else 0


def _number(code: str, data: bytes, position: int) -> int:
    """The number at `position`; an absent field (position 0, but for the root) is 0, flatbuffers' default."""
    if position == 0 and code != "<I":
        return 0
    return int(struct.unpack_from(code, data, position)[0])
