"""The session reader: streams sessions from files, in an order that is a pure function of (seed, epoch, position)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.errors import SettingError
from embedding_service.ragged import Ragged
from trainers.session_batch import ARROW_TYPE, Columns, KeyType, SessionBatch, check_schema, decode_chunk, one_type
from trainers.session_files import open_files, read_chunks

__all__ = ["Columns", "Ragged", "SessionBatch", "SessionReader", "read_ahead"]

T = TypeVar("T")
Int64s = npt.NDArray[np.int64]
ToRows = Callable[[pa.Array], Int64s]  # keys -> rows of a table
_CHUNK_ORDER, _ROW_ORDER, _WINDOW_ORDER = range(3)  # one stream of random numbers for each


@dataclass(frozen=True)
class _EpochOrder:
    """The chunks in the order of an epoch; `ends` int64 [n + 1]: rows before each of them."""

    epoch: int
    chunks: Int64s
    ends: Int64s


@dataclass(frozen=True)
class _CutChunk:
    """A decoded chunk that is shared by neighbouring windows, and its rows in the order of an epoch."""

    epoch: int
    chunk: int
    to_rows: ToRows | None
    batch: SessionBatch
    kept: npt.NDArray[np.bool_] | None
    rows: Int64s


class SessionReader:
    """Streams the sessions of a file, a folder, a glob or a URL: Parquet, Arrow IPC files and streams, also mixed.

    Order: an epoch's chunks (row groups, record batches) are permuted, and the rows, in that order, are cut into
    `num_windows()` windows of nearly equal size, at most `window_sessions`. Rows are permuted inside a window and,
    where a chunk spreads over several windows, inside the chunk before it is cut. All of it follows from (seed, epoch,
    window): a reader elsewhere, or later, with the same files and seed reads the same sessions in the same order.

    Memory: at most three windows (one handed out, one being read, and its parts before they are permuted) and two
    decoded chunks; `stream` needs three chunks. Beside that ~50 bytes per chunk of the data set. A Parquet row group is
    decoded whole, so its size is the user's part of the bound (`lexshard sessions` writes 65,536 sessions each).

    A bad row (null list, null key, null user or time) raises DataError or, with bad_rows="skip", is left out and
    counted. What is wrong with a file always raises. Methods may be called from several threads.
    """

    def __init__(
        self,
        source: str,
        columns: Columns = Columns(),  # noqa: B008 - frozen
        *,
        bad_rows: Literal["error", "skip"] = "error",
        window_sessions: int = 131_072,
        seed: int = 0,
    ) -> None:
        """Reads the files' metadata. Raises DataError if there are none, or they are damaged, empty or do not fit."""
        if window_sessions < 1:
            raise SettingError("data.shuffle_sessions", f"must be at least 1; got {window_sessions}")
        if bad_rows not in ("error", "skip"):
            raise SettingError("data.bad_rows", f"must be error or skip; got {bad_rows!r}")
        self.columns = columns
        self.seed = seed
        self.window_sessions = window_sessions
        self._bad_rows = bad_rows
        self._files = open_files(source, lambda schema, name: check_schema(schema, columns.fields(), name))
        self._types = one_type(self._files, columns.fields())
        rows = np.concatenate([file.chunk_rows for file in self._files])
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        self._file_of = np.repeat(np.arange(len(self._files)), [len(file.chunk_rows) for file in self._files])
        self._first_chunk = np.searchsorted(self._file_of, np.arange(len(self._files)))
        self._bad = np.zeros(len(rows), np.int64)
        self._order: _EpochOrder | None = None
        self._cut: _CutChunk | None = None

    @property
    def num_sessions(self) -> int:
        """Rows of all files, bad ones included."""
        return int(self._starts[-1])

    @property
    def num_bad(self) -> int:
        """Bad rows met so far, each counted once, however often it is read."""
        return int(self._bad.sum())

    @property
    def key_type(self) -> KeyType:
        """The type of item keys, the same in all files."""
        return "int64" if self._types[self.columns.items] == ARROW_TYPE["int64"] else "string"

    @property
    def files(self) -> tuple[str, ...]:
        """The data files, in file order."""
        return tuple(file.name for file in self._files)

    @property
    def fingerprint(self) -> str:
        """Digest of the files' names below `source`, sizes and row counts: the same data has the same one anywhere."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.relative}\0{file.size}\0{file.chunk_rows.tolist()}\n".encode())
        return digest.hexdigest()

    def num_windows(self) -> int:
        """Windows of an epoch, the same for every epoch."""
        return -(-self.num_sessions // self.window_sessions)

    def read_window(self, epoch: int, window: int, to_rows: ToRows | None = None) -> SessionBatch:
        """The sessions of a window (0..num_windows() - 1) in their order. Raises DataError.

        to_rows: what makes of item keys, before they are permuted, the numbers that the batch then has in their place;
        numbers are moved at a fraction of the cost of strings.
        """
        assert epoch >= 0
        assert 0 <= window < self.num_windows()
        start, stop = (self.num_sessions * (window + i) // self.num_windows() for i in (0, 1))
        order = self._epoch_order(epoch)
        first = int(np.searchsorted(order.ends, start, side="right")) - 1
        last = int(np.searchsorted(order.ends, stop, side="left"))
        bounds = {  # chunk -> its part in this window
            int(chunk): (max(start - int(begin), 0), min(stop, int(end)) - int(begin))
            for chunk, begin, end in zip(
                order.chunks[first:last], order.ends[first:last], order.ends[first + 1 : last + 1], strict=True
            )
            if end > begin
        }
        parts = dict(self._read_parts(epoch, bounds, to_rows))
        whole = SessionBatch.concat([parts.pop(chunk) for chunk in sorted(parts)])
        if stop == order.ends[last]:
            self._cut = None
        return whole.take(self._random(epoch, _WINDOW_ORDER, window).permutation(len(whole)))

    def windows(
        self, epoch: int, start: int = 0, *, num_epochs: int = 1, to_rows: ToRows | None = None
    ) -> Generator[tuple[int, SessionBatch]]:
        """(window, its sessions) from window `start` of an epoch to the end of the last of `num_epochs`.

        One window is read ahead, also from epoch to epoch. to_rows: see `read_window`. Raises DataError. Close the
        iterator (or let it end) to stop the reading thread.
        """
        last = (epoch + num_epochs) * self.num_windows()
        places = (divmod(place, self.num_windows()) for place in range(epoch * self.num_windows() + start, last))
        return read_ahead((window, self.read_window(epoch, window, to_rows)) for epoch, window in places)

    def stream(self, columns: Columns | None = None, *, part: int = 0, num_parts: int = 1) -> Iterator[SessionBatch]:
        """All sessions in file order, at most `window_sessions` at a time, read ahead. Raises DataError.

        `columns` may leave out columns of the reader's; rows are then judged by the others alone. `part`: only the
        sessions of one of `num_parts` parts of the data, cut between chunks and of nearly equal size.
        """
        assert columns is None or set(columns.fields()) <= set(self.columns.fields()), "not a subset of the columns"
        cuts = [-(-self.num_sessions * (part + i) // num_parts) for i in (0, 1)]
        first, last = np.searchsorted(self._starts[:-1], cuts).tolist()  # the chunks that begin in the part
        return read_ahead(self._stream(columns or self.columns, range(first, last)))

    def _stream(self, columns: Columns, chunks: range) -> Iterator[SessionBatch]:
        for _, batch, _ in self._decode(chunks, columns):
            for start in range(0, len(batch), self.window_sessions):
                yield batch.slice(start, start + self.window_sessions)

    def _read_parts(
        self, epoch: int, bounds: dict[int, tuple[int, int]], to_rows: ToRows | None
    ) -> Iterator[tuple[int, SessionBatch]]:
        """(chunk, its good sessions in the window) for every chunk in `bounds`."""
        cut, self._cut = self._cut, None
        if cut is not None and (cut.epoch, cut.to_rows) == (epoch, to_rows) and cut.chunk in bounds:
            yield cut.chunk, _part(cut, *bounds.pop(cut.chunk))
            if not bounds:
                self._cut = cut  # it may go on in the next window
        del cut
        for chunk, batch, kept in self._decode(sorted(bounds), self.columns):
            if to_rows is not None:
                batch = dataclasses.replace(batch, items=batch.items.with_values(to_rows(batch.items.values)))
            num_rows = int(self._starts[chunk + 1] - self._starts[chunk])
            if bounds[chunk] == (0, num_rows):
                yield chunk, batch
                continue
            rows = self._random(epoch, _ROW_ORDER, chunk).permutation(num_rows)
            self._cut = _CutChunk(epoch, chunk, to_rows, batch, kept, rows)
            yield chunk, _part(self._cut, *bounds[chunk])

    def _decode(
        self, chunks: Sequence[int], columns: Columns
    ) -> Iterator[tuple[int, SessionBatch, npt.NDArray[np.bool_] | None]]:
        """(chunk, its good sessions, which rows they are) of the `chunks` (ascending); every file is opened once."""
        names = [one.name for one in columns.fields()]
        for number, group in itertools.groupby(chunks, key=lambda chunk: int(self._file_of[chunk])):
            file, first = self._files[number], int(self._first_chunk[number])
            with closing(read_chunks(file, [chunk - first for chunk in group], names)) as reading:
                for local, arrays in reading:
                    chunk = first + local
                    batch, kept = decode_chunk(
                        arrays,
                        columns,
                        self._types,
                        first_row=int(self._starts[chunk]),
                        bad_rows=self._bad_rows,
                        file=file.name,
                        chunk=local,
                    )
                    self._bad[chunk] = max(self._bad[chunk], 0 if kept is None else int((~kept).sum()))
                    yield chunk, batch, kept

    def _epoch_order(self, epoch: int) -> _EpochOrder:
        order = self._order
        if order is None or order.epoch != epoch:
            chunks = self._random(epoch, _CHUNK_ORDER, 0).permutation(len(self._bad))
            ends = np.concatenate([[0], np.cumsum(np.diff(self._starts)[chunks])])
            self._order = order = _EpochOrder(epoch, chunks, ends)
        return order

    def _random(self, epoch: int, purpose: int, number: int) -> np.random.Generator:
        seeds = np.random.SeedSequence(self.seed, spawn_key=(epoch, purpose, number))
        return np.random.Generator(np.random.PCG64(seeds))


def read_ahead(items: Iterator[T]) -> Generator[T]:
    """The `items` in order, the next one computed in a background thread while the caller works on the last.

    What `items` raises is raised here, in its place. The thread has ended when the iterator has ended, has been closed
    or has raised; `items` is closed by then if it can be.
    """
    end: Any = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        upcoming = pool.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, items, end)
            yield item
            del item  # or it would be in memory until the next one is ready
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        close = getattr(items, "close", None)
        if close is not None:
            close()


def _part(cut: _CutChunk, start: int, stop: int) -> SessionBatch:
    """The good sessions among rows start..stop - 1 of the chunk's order."""
    rows = cut.rows[start:stop]
    if cut.kept is not None:
        rows = (np.cumsum(cut.kept) - 1)[rows[cut.kept[rows]]]
    return cut.batch.take(rows)
