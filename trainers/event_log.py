"""Event logs to sessions: one row per event in, one row per session out, out of core.

DuckDB sorts, spilling to disk; everything else is a stream. Files are read and checked by this package, so DuckDB sees
columns under fixed names only, never a path or a name of the user's.
"""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from cluster.errors import DataError, SettingError
from cluster.storage import open_filesystem, sync_folder
from embedding_service.ragged import offsets_of
from trainers.session_batch import Field, check_schema, decode_column, one_type
from trainers.session_files import SessionFile, open_files, read_chunks

_BATCH_EVENTS = 262_144  # rows that pass through at a time
_BATCH_SESSIONS = 16_384
_MILLISECONDS = 1e11  # as epoch seconds: the year 5138


@dataclass(frozen=True)
class SessionizeSummary:
    """What became of an event log. Lengths are of the sessions written, in events."""

    events: int
    sessions: int
    dropped_events: int  # without an item, an id or a time (only with bad_events="skip")
    dropped_sessions: int  # shorter than min_length
    min_length: int
    mean_length: float
    max_length: int


def sessionize(
    source: str,
    output: str | Path,
    *,
    item: str,
    time: str = "",
    session: str = "",
    user: str = "",
    gap_seconds: float = 1800,
    min_length: int = 1,
    bad_events: Literal["error", "skip"] = "error",
    row_group_sessions: int = 65_536,
    memory_limit: str = "2GB",
    temp_folder: str | Path = "",
) -> SessionizeSummary:
    """Write the sessions of the event log `source` (file, folder, glob or URL; Parquet or Arrow) to Parquet `output`.

    `item`, `time`, `session` and `user` name columns. Events of one `session` id are one session (of one user, if
    `user` is named as well: an id that two users share is two sessions). Without `session`, the events of one `user`
    are cut where more than `gap_seconds` lie between two. Inside a session events are ordered by time; those of one
    time, or of none, stay as in the log. `time` is a timestamp, a date, or a number of seconds.

    The output has the columns `session` and / or `user`, `time` (of the first event; if there are times) and `items`
    (list), ordered by (time, session, user), and depends on the source and these arguments alone. It appears under its
    name when it is complete. DuckDB sorts within `memory_limit`, spilling to `temp_folder` (default: the system's);
    beside that one row group of the log, one of the output, some batches of events and the longest session are in
    memory.

    Raises DataError for what is wrong with the log, SettingError for what is wrong with an argument.
    """
    _check_arguments(time, session, user, gap_seconds, min_length, row_group_sessions, memory_limit)
    keys = [Field(role, name, "keys", f"--{role} ") for role, name in (("session", session), ("user", user)) if name]
    times = [Field("time", time, "time", "--time ")] if time else []
    fields = [*keys, *times, Field("item", item, "keys", "--item ")]
    files = open_files(source, lambda schema, name: check_schema(schema, fields, name))
    _check_output(output, files)
    events = _Events(files, fields, skip_bad=bad_events == "skip", in_seconds=not session)
    by = [one.role for one in keys]
    with (
        tempfile.TemporaryDirectory(prefix="lexshard-", dir=temp_folder or None) as folder,
        _translated_errors(events),
        _duckdb(memory_limit, folder) as database,
        _published(output) as sink,
    ):
        reader = pa.RecordBatchReader.from_batches(events.schema, iter(events))
        ordered = _sorted(database, reader, [*by, *(["time"] if time else []), "position"])
        sessions = _Sessions(ordered, by, None if session else gap_seconds, min_length, events)
        if not time:
            _write(iter(sessions), sessions.schema, sink, row_group_sessions)
        else:  # the first sort has brought a user's events together, the second brings sessions into order
            spill = Path(folder) / "sessions.parquet"
            numbered = sessions.schema.append(pa.field("number", pa.int64()))
            _write(iter(sessions), numbered, spill, row_group_sessions)
            with pq.ParquetFile(spill) as written:
                batches = written.iter_batches(min(row_group_sessions, _BATCH_SESSIONS), use_threads=False)
                unordered = pa.RecordBatchReader.from_batches(written.schema_arrow, batches)
                ordered = _sorted(database, unordered, ["time", *by, "number"])
                _write(ordered, sessions.schema, sink, row_group_sessions)
        return sessions.summary()


class _Events:
    """The good events of a log as record batches: keys, time, item, and `position`, the event's number in the log."""

    def __init__(self, files: list[SessionFile], fields: list[Field], *, skip_bad: bool, in_seconds: bool) -> None:
        """`in_seconds`: numeric times are held against what seconds can be."""
        self._files, self._fields, self._skip_bad, self._in_seconds = files, fields, skip_bad, in_seconds
        self._types = one_type(files, fields)
        self.schema = pa.schema([*((one.role, self._types[one.name]) for one in fields), ("position", pa.int64())])
        self.num_events = 0
        self.num_bad = 0
        self.error: Exception | None = None  # what has stopped the stream; DuckDB passes no more than its text on
        self._first_bad: tuple[str, str, int, int] | None = None  # problem, file, row group, row

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        names = list(dict.fromkeys(one.name for one in self._fields))
        try:
            for file in self._files:
                for chunk, arrays in read_chunks(file, range(len(file.chunk_rows)), names):
                    batch = self._decode(arrays, file.name, chunk)
                    for start in range(0, batch.num_rows, _BATCH_EVENTS):
                        yield batch.slice(start, _BATCH_EVENTS)
            if self._first_bad is not None and not self._skip_bad:
                problem, name, chunk, row = self._first_bad
                raise DataError(
                    f"{problem}; {self.num_bad} of {self.num_events} events cannot be used: mend them, or leave such "
                    "events out and count them: `--bad-events skip`",
                    file=name,
                    row_group=chunk,
                    row=row,
                )
        except Exception as error:
            self.error = error
            raise

    def _decode(self, arrays: dict[str, list[pa.Array]], file: str, chunk: int) -> pa.RecordBatch:
        columns: list[Any] = []
        problems: list[tuple[str, npt.NDArray[np.bool_]]] = []
        for one in self._fields:
            values: Any
            values, found = decode_column(one, arrays[one.name], self._types[one.name])
            columns.append(values)
            problems += found
            if one.kind == "time" and self._in_seconds and values.type != pa.timestamp("us"):
                self._check_seconds(one.name, values, file, chunk)
        positions = np.arange(self.num_events, self.num_events + len(columns[0]), dtype=np.int64)
        self.num_events += len(positions)
        batch = pa.RecordBatch.from_arrays([*columns, pa.array(positions)], schema=self.schema)
        if not problems:
            return batch
        bad = np.logical_or.reduce([rows for _, rows in problems])
        self.num_bad += int(bad.sum())
        if self._first_bad is None:
            row = int(bad.argmax())
            self._first_bad = (next(text for text, rows in problems if rows[row]), file, chunk, row)
        return batch.filter(pa.array(~bad))

    def _check_seconds(self, name: str, times: pa.Array, file: str, chunk: int) -> None:
        largest = pc.max(times).as_py()
        if largest is not None and largest >= _MILLISECONDS:
            raise DataError(
                f"column `{name}` holds {largest}, which is no time in seconds; milliseconds? Store "
                "seconds, or a timestamp",
                file=file,
                row_group=chunk,
                row=pc.index(times, largest).as_py(),
            )


class _Sessions:
    """The sessions of events that come ordered by key and time, as record batches; counts them on the way.

    Beside `schema`'s columns a batch has `number`, the session's number in this order.
    """

    def __init__(
        self, ordered: Iterator[pa.RecordBatch], keys: list[str], gap: float | None, min_length: int, events: _Events
    ) -> None:
        self._ordered, self._keys, self._min_length, self._events = ordered, keys, min_length, events
        types = {one.name: _plain(one.type) for one in events.schema}
        self._gap = gap if gap is None or types["time"] != pa.timestamp("us") else gap * 1_000_000
        heads = [(name, types[name]) for name in (*keys, "time") if name in types]
        self.schema = pa.schema([*heads, ("items", pa.list_(types["item"]))])
        self._found = self._written = self._written_events = 0
        self._shortest, self._longest = 2**62, 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        open_session: list[pa.RecordBatch] = []  # the last session so far: its events may go on in the next batch
        for batch in self._ordered:
            if not batch.num_rows:
                continue
            starts = self._starts(batch)
            if open_session and self._continues(open_session[-1], batch):
                starts = starts[1:]
            if not len(starts):
                open_session.append(batch)
                continue
            first, last = int(starts[0]), int(starts[-1])
            parts = [*open_session, batch.slice(0, first)]
            yield from self._close(parts, np.zeros(1 if open_session else 0, np.int64))
            yield from self._close([batch.slice(first, last - first)], starts[:-1] - first)
            open_session = [batch.slice(last)]
        if open_session:
            yield from self._close(open_session, np.zeros(1, np.int64))

    def summary(self) -> SessionizeSummary:
        """The counts. Raises DataError if no session was long enough."""
        events = self._events
        if not self._written:
            good = events.num_events - events.num_bad
            problem = f"none of its {self._found} sessions ({good} events) has {self._min_length} events or more"
            raise DataError(f"no session is left: {problem}; lower `--min-length`")
        return SessionizeSummary(
            events=events.num_events,
            sessions=self._written,
            dropped_events=events.num_bad,
            dropped_sessions=self._found - self._written,
            min_length=self._shortest,
            mean_length=self._written_events / self._written,
            max_length=self._longest,
        )

    def _starts(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Where sessions begin in the batch, its first event always."""
        begins = np.ones(batch.num_rows, bool)
        begins[1:] = self._differs(batch.slice(0, batch.num_rows - 1), batch.slice(1))
        return np.flatnonzero(begins)

    def _continues(self, before: pa.RecordBatch, after: pa.RecordBatch) -> bool:
        return not self._differs(before.slice(before.num_rows - 1), after.slice(0, 1))[0]

    def _differs(self, before: pa.RecordBatch, after: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """Row by row: do the two events belong to different sessions?"""
        differs = np.zeros(before.num_rows, bool)
        for key in self._keys:
            differs |= pc.not_equal(before.column(key), after.column(key)).to_numpy(zero_copy_only=False)
        if self._gap is not None:
            times = [batch.column("time") for batch in (before, after)]
            first, second = (one.view(pa.int64()) if one.type == pa.timestamp("us") else one for one in times)
            differs |= second.to_numpy() - first.to_numpy() > self._gap
        return differs

    def _close(self, parts: list[pa.RecordBatch], starts: npt.NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
        """The sessions that begin at `starts` of the joined `parts`, the last of them complete."""
        if not len(starts):
            return
        events = pa.Table.from_batches(parts).combine_chunks()
        lengths = np.diff(np.append(starts, events.num_rows))
        self._found += len(starts)
        long_enough = np.flatnonzero(lengths >= self._min_length)
        if not len(long_enough):
            return
        kept = lengths[long_enough]
        numbers = np.arange(self._written, self._written + len(kept), dtype=np.int64)
        self._written += len(kept)
        self._written_events += int(kept.sum())
        self._shortest, self._longest = min(self._shortest, int(kept.min())), max(self._longest, int(kept.max()))
        heads = events.select(self.schema.names[:-1]).take(pa.array(starts[long_enough]))
        items = events.column("item").combine_chunks()
        if len(kept) < len(lengths):
            items = items.filter(pa.array(np.repeat(lengths >= self._min_length, lengths)))
        lists = pa.ListArray.from_arrays(pa.array(offsets_of(kept).astype(np.int32)), items)
        table = heads.append_column("items", lists).append_column("number", pa.array(numbers))
        yield from table.combine_chunks().to_batches()


def _plain(found: pa.DataType) -> pa.DataType:
    """The type to write: plain strings, which every reader of Parquet knows."""
    return pa.string() if found == pa.large_string() else found


def _sorted(
    database: duckdb.DuckDBPyConnection, stream: pa.RecordBatchReader, by: list[str]
) -> Iterator[pa.RecordBatch]:
    """The rows of `stream` ordered by the columns `by` (our names, never the user's)."""
    database.register("stream", stream)
    order = ", ".join(f'"{name}"' for name in by)
    yield from database.sql(f"SELECT * FROM stream ORDER BY {order}").to_arrow_reader(_BATCH_EVENTS)


def _write(batches: Iterator[pa.RecordBatch], schema: pa.Schema, sink: Any, row_group_sessions: int) -> None:
    """Write the columns of `schema` as Parquet with row groups of `row_group_sessions` rows."""
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        waiting: list[pa.RecordBatch] = []
        for batch in batches:
            waiting.append(batch.select(schema.names))
            while sum(one.num_rows for one in waiting) >= row_group_sessions:
                table = pa.Table.from_batches(waiting)
                writer.write_table(table.slice(0, row_group_sessions).cast(schema))
                waiting = table.slice(row_group_sessions).to_batches()
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting).cast(schema))


@contextmanager
def _duckdb(memory_limit: str, temp_folder: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in memory that spills to `temp_folder` and can neither read nor load anything else."""
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": memory_limit,
        "temp_directory": temp_folder,
        "autoload_known_extensions": "false",
    }
    with duckdb.connect(config=settings) as database:
        yield database


@contextmanager
def _published(output: str | Path) -> Iterator[Any]:
    """A file to write; it gets the name `output` when the block ends well, and goes away when it does not."""
    filesystem, target = open_filesystem(output)
    folder, _, name = target.rpartition("/")
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
    local = isinstance(filesystem, fs.LocalFileSystem)
    try:
        filesystem.create_dir(folder, recursive=True)
        sink = filesystem.open_output_stream(temporary)
    except OSError as error:
        raise SettingError("output", f"{output} cannot be written: {error}") from None
    try:
        with sink:
            yield sink
        if local:
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        filesystem.move(temporary, target)
        if local:
            sync_folder(folder)
    except BaseException:
        with suppress(FileNotFoundError):
            filesystem.delete_file(temporary)
        raise


@contextmanager
def _translated_errors(events: _Events) -> Iterator[None]:
    """Errors of the sort as the user's: those of the stream it reads are raised as they were."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException) as error:
        if events.error is not None:
            raise events.error from None
        reason = " ".join(str(error).split())
        if isinstance(error, duckdb.OutOfMemoryException):
            raise SettingError("memory_limit", f"is too small to sort this log: {reason}") from None
        if isinstance(error, duckdb.IOException):
            raise SettingError("temp_folder", f"the sort cannot spill there: {reason}") from None
        raise


def _check_output(output: str | Path, files: list[SessionFile]) -> None:
    """Raises SettingError for an output that is a folder, or one of the files that are read."""
    filesystem, target = open_filesystem(output)
    if filesystem.get_file_info(target).type == fs.FileType.Directory:
        raise SettingError("output", f"{output} is a folder; name the Parquet file to write")
    real = os.path.realpath if isinstance(filesystem, fs.LocalFileSystem) else str
    for file in files:
        if file.filesystem.equals(filesystem) and real(file.path) == real(target):
            raise SettingError("output", f"{output} is one of the files that are read; name another")


def _check_arguments(
    time: str, session: str, user: str, gap_seconds: float, min_length: int, row_group_sessions: int, memory_limit: str
) -> None:
    if not session and not user:
        raise SettingError("session", "name the column of session ids, or `user` and `time` to cut sessions at pauses")
    if not session and not time:
        raise SettingError("time", "sessions of a user are cut at pauses: name the column of times, or of session ids")
    if not gap_seconds > 0:
        raise SettingError("gap_seconds", f"must be above 0; got {gap_seconds}")
    for name, value in (("min_length", min_length), ("row_group_sessions", row_group_sessions)):
        if value < 1:
            raise SettingError(name, f"must be at least 1; got {value}")
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", memory_limit):
        raise SettingError("memory_limit", f"must be a size such as 2GB or 500MB; got {memory_limit!r}")
