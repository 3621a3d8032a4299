"""The files of a data set: finding them, opening them, and reading their chunks.

A chunk is what a file can give in one piece: a row group of a Parquet file, a record batch of an Arrow one. Files are
not kept open between reads, and never memory-mapped: a mapped file that shrinks kills the process.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cluster.errors import DataError
from cluster.storage import open_filesystem
from trainers import ipc_messages

_OPENERS = 8  # files opened side by side: object stores answer slowly, but many at once
_IGNORED = "files whose name starts with _ or . are ignored"


@dataclass(frozen=True)
class SessionFile:
    """One file as it was when it was opened."""

    name: str  # as messages show it
    relative: str  # to the data set's folder
    path: str  # on `filesystem`
    size: int
    schema: pa.Schema
    chunk_rows: npt.NDArray[np.int64]
    filesystem: fs.FileSystem = field(repr=False)
    messages: ipc_messages.MessageIndex | None  # of an Arrow file; None: Parquet


def find_files(source: str) -> list[tuple[str, str, fs.FileInfo, fs.FileSystem]]:
    """(name, path relative to the source's folder, file info, filesystem) of the data files of `source`, sorted.

    `source` is a file, a folder (read recursively) or a glob (`*`, `?`, `[...]`, `**`; it may match folders too), as a
    local path or a URL (there `?` starts the query and is no wildcard). Hidden files, `_` or `.` first, are ignored
    unless named outright. Raises DataError if there is none.
    """
    if not source:
        raise DataError("no data is named: `--set data.train=PATH` names a file, a folder, a glob or a URL")
    scheme, base, pattern, query = _split_glob(source)
    filesystem, root = open_filesystem(scheme + base + query)
    with _reading(source):
        info = filesystem.get_file_info(root)
        if not pattern and info.type == fs.FileType.File:
            return [(source, info.base_name, info, filesystem)]
        if info.type != fs.FileType.Directory:
            problem = f"matches nothing: there is no folder {base}" if pattern else "there is no such file or folder"
            raise DataError(f"{problem}; check the path (relative to the working directory)", file=source)
        found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    matches = re.compile((_pattern_regex(pattern) if pattern else "[^._][^/]*") + r"(?:/[^._/][^/]*)*").fullmatch
    prefix = root.rstrip("/") + "/"
    files = [
        (scheme + info.path, info.path.removeprefix(prefix), info, filesystem)
        for info in sorted(found, key=lambda info: info.path)
        if info.type == fs.FileType.File and matches(info.path.removeprefix(prefix))
    ]
    if not files:
        raise DataError(("matches no file" if pattern else "holds no file") + f" ({_IGNORED})", file=source)
    return files


def open_files(source: str, check: Callable[[pa.Schema, str], object]) -> list[SessionFile]:
    """The opened files of `source`; `check(schema, file name)` raises what is wrong with a schema.

    Reads the files' metadata only. Raises DataError for the first file that cannot be read.
    """

    def open_one(entry: tuple[str, str, fs.FileInfo, fs.FileSystem]) -> SessionFile:
        file = _open_file(*entry)
        check(file.schema, file.name)
        return file

    with ThreadPoolExecutor(_OPENERS) as pool:
        files = list(pool.map(open_one, find_files(source)))
    if not sum(int(file.chunk_rows.sum()) for file in files):
        raise DataError(f"the data set is empty: {len(files)} file(s), 0 rows", file=source)
    return files


def read_chunks(
    file: SessionFile, chunks: Sequence[int], columns: Sequence[str]
) -> Generator[tuple[int, dict[str, list[pa.Array]]], None, None]:
    """(chunk, the Arrow arrays of each column) of the `chunks` (ascending) of a file, one after the other.

    Raises DataError, with file and row group, if the file has vanished, has changed or is damaged.
    """
    with _reading(file.name):
        handle = file.filesystem.open_input_file(file.path)
    with handle:
        if handle.size() != file.size:
            raise DataError(
                f"has changed since it was opened ({file.size} bytes then, {handle.size()} now); start again",
                file=file.name,
            )
        read = _read_parquet if file.messages is None else _read_ipc
        batches = read(file, handle, chunks, columns)
        for chunk in chunks:
            with _reading(file.name, chunk):
                _, table = next(batches)
                table.validate(full=True)  # few files carry checksums, and wrong offsets would be read out of bounds
            if table.num_rows != file.chunk_rows[chunk]:
                raise DataError("has changed since it was opened; start again", file=file.name, row_group=chunk)
            arrays = {name: table.column(name) for name in columns}
            yield chunk, {name: getattr(array, "chunks", [array]) for name, array in arrays.items()}


def _read_parquet(
    file: SessionFile, handle: Any, chunks: Sequence[int], columns: Sequence[str]
) -> Iterator[tuple[int, pa.Table]]:
    remote = not isinstance(file.filesystem, fs.LocalFileSystem)
    with pq.ParquetFile(handle, pre_buffer=remote) as parquet:
        for chunk in chunks:
            yield chunk, parquet.read_row_group(chunk, columns=list(columns), use_threads=False)


def _read_ipc(
    file: SessionFile, handle: Any, chunks: Sequence[int], columns: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    assert file.messages is not None
    fields = [file.schema.get_field_index(name) for name in columns]
    return ipc_messages.read_batches(handle, file.messages, chunks, fields)


def _open_file(name: str, relative: str, info: fs.FileInfo, filesystem: fs.FileSystem) -> SessionFile:
    """The file with its schema and chunks, its kind told by its first bytes."""
    with _reading(name), filesystem.open_input_file(info.path) as handle:
        size = handle.size()
        head = handle.read(8)
        if head[:4] == b"PAR1":
            handle.seek(max(size - 4, 0))
            if size < 12 or handle.read(4) != b"PAR1":
                raise DataError(
                    "is a truncated Parquet file: it does not end in PAR1; write or copy it again", file=name
                )
            with pq.ParquetFile(handle) as parquet:
                metadata = parquet.metadata
                groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
                schema, messages, rows = parquet.schema_arrow, None, np.array(groups, np.int64)
        elif head[:6] == ipc_messages.FILE_MAGIC or _may_be_stream(head, size):
            messages = ipc_messages.scan_messages(handle, size)
            schema, rows = ipc_messages.read_schema(handle, messages), messages.rows
        else:
            found = f"it starts with {head!r}" if head else "it has 0 bytes"
            raise DataError(
                f"is neither Parquet nor Arrow IPC ({found}); convert it or take it away ({_IGNORED})", file=name
            )
        assert len(schema.names) == len(schema)  # reads the names, which damage may have made undecodable
    return SessionFile(name, relative, info.path, size, schema.remove_metadata(), rows, filesystem, messages)


def _may_be_stream(head: bytes, size: int) -> bool:
    """True if an Arrow stream can begin with `head`: a continuation mark, or (before Arrow 0.15) a metadata length."""
    return head[:4] == ipc_messages.CONTINUATION or (len(head) == 8 and 0 < struct.unpack("<i", head[:4])[0] < size)


@contextmanager
def _reading(name: str, chunk: int | None = None) -> Iterator[None]:
    """Turns what can go wrong while a file is read into one DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError("has vanished since the data set was opened; restore it, or start again", file=name) from None
    except PermissionError:
        raise DataError("may not be read: permission denied", file=name) from None
    except ipc_messages.DamagedStream as error:
        raise DataError(f"{error}; write or copy it again", file=name, row_group=error.batch) from None
    except (pa.ArrowException, OSError, EOFError, StopIteration, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"is damaged: {reason}; write or copy it again", file=name, row_group=chunk) from error


def _split_glob(source: str) -> tuple[str, str, str, str]:
    """(scheme, folder before the first wildcard, pattern below it, query of a URL) of a source."""
    scheme, separator, rest = source.rpartition("://") if "://" in source else ("", "", source)
    query = ""
    if separator:
        rest, mark, query = rest.partition("?")
        query = mark + query
    wildcard = re.search(r"[*\[]" if separator else r"[*?\[]", rest)
    if not wildcard or (not separator and open_filesystem(rest)[0].get_file_info(rest).type != fs.FileType.NotFound):
        return scheme + separator, rest, "", query
    cut = rest.rfind("/", 0, wildcard.start()) + 1
    return scheme + separator, rest[:cut] or ("" if separator else "."), rest[cut:], query


def _pattern_regex(pattern: str) -> str:
    """A glob as a regular expression over a relative path. Like a shell's: a wildcard does not match a leading dot
    (or underscore), `*` stays inside one path segment, `**` is any number of segments."""
    segments = []
    for segment in pattern.strip("/").split("/"):
        if segment == "**":
            segments.append(r"(?:[^._/][^/]*/)*")
            continue
        translated = "".join(
            {"*": "[^/]*", "?": "[^/]"}.get(token) or (_class(token) if len(token) > 1 else re.escape(token))
            for token in re.findall(r"\[[!^]?\]?[^]/]*\]|.", segment)
        )
        segments.append(("(?![._])" if segment[0] in "*?[" else "") + translated + "/")
    joined = "".join(segments)
    return joined.removesuffix("/") if not joined.endswith(")*") else joined + "[^._/][^/]*"


def _class(token: str) -> str:
    """A glob's `[...]` as a regular expression's."""
    body = token[1:-1].replace("\\", r"\\").replace("[", r"\[")
    return f"[^/{body[1:]}]" if body[0] in "!^" else f"(?!/)[{body}]"
