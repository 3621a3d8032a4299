"""Key -> row and row -> key: the exact vocabulary that training and serving share."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import ArtifactError, DataError, SettingError
from cluster.storage import complete_file
from embedding_service.hashing import int64_values, key_array, stable_hash, string_bytes

Key = int | str
KeyType = Literal["int64", "string"]

_FORMAT = "lexshard.vocabulary"
_FORMAT_VERSION = 1
_FEW_KEYS = 32  # Python objects that are looked up one by one: Arrow costs more than that
_MAX_LOAD = 2 / 3  # share of the hash table's slots that keys may take


class Vocabulary:
    """An exact map between distinct keys and rows 0, 1, 2...; most frequent key first, ties by key ascending.

    `keys`         int64 or large_string [n], in row order
    `counts`       int64 [n], how often each key occurs in the data the vocabulary was built from
    `dropped`      how many occurrences of rarer keys that data had besides
    `unknown`      "row": every other key has the one row n, the last; "skip": it has none, which lookups write as -1
    `num_rows`     n, and one more for the unknown row
    `num_seen`     how many keys, the first ones, occur at all; the others were added by `with_unseen`
    `fingerprint`  equal for equal vocabularies, different for different ones, stable across machines

    Lookups go through an open-addressing table over the keys' stable hash, 12 to 24 bytes per key, built here in one
    pass; they compare whole keys, never hashes alone. Immutable, and safe to use from many threads at once: batches
    release the GIL.
    """

    def __init__(
        self,
        keys: pa.Array,
        counts: npt.NDArray[np.int64],
        *,
        unknown: Literal["skip", "row"] = "skip",
        dropped: int = 0,
    ) -> None:
        """`keys` [n] and `counts` [n] in row order. Raises DataError for null, repeated or unordered keys."""
        from embedding_service import hash_kernels as kernels

        if unknown not in ("skip", "row"):
            raise SettingError("keys.unknown", f"must be skip or row; got {unknown!r}")
        self._kernels = kernels
        self.keys = key_array(keys)
        self.counts = np.ascontiguousarray(counts, dtype=np.int64).view()
        self.counts.flags.writeable = False
        self.dropped = dropped
        self.unknown: Literal["skip", "row"] = unknown
        self.key_type: KeyType = "int64" if self.keys.type == pa.int64() else "string"
        self.num_rows = len(self.keys) + (unknown == "row")
        self.num_seen = int(np.count_nonzero(self.counts))
        self._unknown_row = len(self.keys) if unknown == "row" else -1
        if self.keys.null_count:
            raise DataError("a vocabulary has no null keys")
        if len(self.counts) != len(self.keys):
            raise DataError(f"{len(self.keys)} keys have {len(self.counts)} counts")
        if np.any(self.counts[1:] > self.counts[:-1]):
            raise DataError("keys are not ordered by frequency")
        self._columns = _columns(self.keys)
        self._slots = np.zeros(_num_slots(len(self.keys)), dtype=np.uint64)
        fill = kernels.fill_int64 if self.key_type == "int64" else kernels.fill_bytes
        repeated = fill(*self._columns, len(self.keys), self._slots)
        if repeated >= 0:
            raise DataError(f"key {self.keys[repeated].as_py()!r} is there twice")
        self._slots.flags.writeable = False

    @classmethod
    def build(
        cls, chunks: Iterable[pa.Array], *, min_count: int = 1, unknown: Literal["skip", "row"] = "skip"
    ) -> Vocabulary:
        """The vocabulary of all keys in `chunks` that occur at least `min_count` times.

        One pass; the result does not depend on how the keys are cut into chunks. Memory is that of the distinct keys,
        rare ones included (about 100 bytes for each, and for strings three times their UTF-8 length), and one chunk.

        Raises DataError for null keys, keys of another or of changing type, and where no key is left; SettingError
        for a `min_count` below 1.
        """
        if min_count < 1:
            raise SettingError("keys.min_count", f"must be at least 1; got {min_count}")
        counter: _Int64Counter | _StringCounter | None = None
        for chunk in chunks:
            array = key_array(chunk)
            if array.null_count:
                raise DataError("a key is null")
            if counter is None:
                counter = _Int64Counter() if array.type == pa.int64() else _StringCounter()
            if array.type != counter.type:
                raise DataError(f"keys are {counter.type} at first and {array.type} later; cast them to one type")
            counter.add(array)
        if counter is None or counter.num_keys == 0:
            raise DataError("there are no keys to build a vocabulary from: the data is empty")
        keys, counts = counter.result()
        kept = counts >= min_count
        if not kept.any():
            raise DataError(
                f"no key occurs min_count = {min_count} times (the most frequent occurs {counts.max()} times); "
                "lower keys.min_count"
            )
        total = int(counts.sum())
        if not kept.all():
            keys, counts = keys.filter(pa.array(kept)), counts[kept]
        table = pa.table({"keys": keys, "counts": counts})
        order = pc.sort_indices(table, sort_keys=[("counts", "descending"), ("keys", "ascending")])
        counts = counts[order.to_numpy()]
        return cls(keys.take(order), counts, unknown=unknown, dropped=total - int(counts.sum()))

    def with_unseen(self, keys: pa.Array) -> Vocabulary:
        """This vocabulary and, behind its keys and with count 0, those of `keys` that it does not have, ascending.

        Raises DataError for keys of another type.
        """
        added = pc.unique(key_array(keys).filter(pa.array(~self._has(keys))))
        added = added.take(pc.sort_indices(added))
        counts = np.append(self.counts, np.zeros(len(added), np.int64))
        return Vocabulary(pa.concat_arrays([self.keys, added]), counts, unknown=self.unknown, dropped=self.dropped)

    def _has(self, keys: pa.Array) -> npt.NDArray[np.bool_]:
        rows = self.rows(keys)
        has: npt.NDArray[np.bool_] = (rows >= 0) & (rows < len(self.keys))
        return has

    @property
    def num_keys(self) -> int:
        """n, without the unknown row."""
        return len(self.keys)

    @functools.cached_property
    def fingerprint(self) -> str:
        """128 bits of hash, in hex, over all that makes this vocabulary: keys, counts, `dropped` and `unknown`."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self.key_type, len(self.keys), self.unknown, self.dropped]).encode())
        digest.update(pa.py_buffer(stable_hash(self.keys)))
        digest.update(pa.py_buffer(self.counts))
        return digest.hexdigest()

    def rows(self, keys: pa.Array | pa.ChunkedArray | npt.NDArray[Any] | Sequence[Any]) -> npt.NDArray[np.int64]:
        """Rows of `keys` [n], int64 [n]; unknown and null keys have the unknown row, or -1 where `unknown` is "skip".

        Arrow and NumPy arrays hold keys of one type: DataError if it is not the vocabulary's. A Python sequence may
        hold anything; what is not a key of the vocabulary's type is unknown, as in `row`.
        """
        if not isinstance(keys, (pa.Array, pa.ChunkedArray, np.ndarray)):
            return self._rows_of_objects(keys)
        if isinstance(keys, pa.DictionaryArray):
            rows = np.append(self.rows(keys.dictionary), self._unknown_row)  # the last one is for nulls
            places: npt.NDArray[np.int64] = keys.indices.cast(pa.int64()).fill_null(len(rows) - 1).to_numpy()
            return rows[places]
        array = key_array(keys)
        if array.type != self.keys.type:
            raise DataError(f"these keys are {array.type}, those of the vocabulary {self.keys.type}")
        out = np.empty(len(array), dtype=np.int64)
        find = self._kernels.find_int64 if self.key_type == "int64" else self._kernels.find_bytes
        find(*_columns(array), self._unknown_row, *self._columns, self._slots, out)
        if array.null_count:
            out[array.is_null().to_numpy(zero_copy_only=False)] = self._unknown_row
        return out

    def row(self, key: object) -> int:
        """The row of one key; that of unknown keys (-1 where `unknown` is "skip") for anything that is not one.

        `key` must be an int for an int64 vocabulary and a str for a string vocabulary to be known: "7" is not 7.
        """
        row = -1
        if self.key_type == "string":
            if isinstance(key, str):
                row = self._find_text(key)
        elif isinstance(key, (int, np.integer)) and not isinstance(key, bool) and -(2**63) <= key < 2**63:
            row = self._kernels.find_one_int64(int(key), self._columns[0], self._slots)
        return row if row >= 0 else self._unknown_row

    def keys_of(self, rows: npt.NDArray[np.integer[Any]] | Sequence[int]) -> pa.Array:
        """Keys of `rows` [n], an int64 or large_string array [n]; null for the unknown row.

        Raises IndexError for a row outside [0, num_rows): take out -1 padding first.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.num_rows):
            wrong = wanted[(wanted < 0) | (wanted >= self.num_rows)][0]
            raise IndexError(f"row {wrong} is not one of the vocabulary's {self.num_rows} rows")
        if self.key_type == "int64" and self.unknown == "skip":
            return pa.array(self._columns[0][wanted])
        unknown = wanted == self._unknown_row
        return self.keys.take(pa.array(wanted, mask=unknown if unknown.any() else None))

    def save(self, path: str | Path) -> None:
        """Write one uncompressed Arrow IPC file (columns `keys`, `counts`), which `load` maps into memory.

        The file appears whole or not at all, and is the same, byte by byte, for equal vocabularies.
        """
        meta = {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "unknown": self.unknown,
            "dropped": self.dropped,
            "fingerprint": self.fingerprint,
        }
        schema = pa.schema(
            [pa.field("keys", self.keys.type, nullable=False), pa.field("counts", pa.int64(), nullable=False)],
            metadata={_FORMAT: json.dumps(meta, sort_keys=True)},
        )
        with (
            complete_file(path) as temporary,
            pa.OSFile(os.fspath(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            writer.write_batch(pa.record_batch([self.keys, pa.array(self.counts)], schema=schema))

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """The vocabulary that `save` wrote; its keys stay in the file, mapped into memory.

        Raises ArtifactError, which names the file, if it is missing, damaged (any bit) or something else.
        """
        try:
            with pa.memory_map(os.fspath(path)) as source, pa.ipc.open_file(source) as reader:
                meta = json.loads((reader.schema.metadata or {}).get(_FORMAT.encode(), b"null"))
                if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
                    raise ArtifactError(f"{path}: is not a lexshard vocabulary")
                if meta["version"] != _FORMAT_VERSION:
                    raise ArtifactError(
                        f"{path}: has format version {meta['version']}, this lexshard reads {_FORMAT_VERSION}"
                    )
                batch = reader.get_batch(0)
            batch.validate(full=True)
            keys, counts = batch.column("keys"), batch.column("counts")
            if counts.type != pa.int64() or counts.null_count:
                raise ArtifactError(f"{path}: its counts are not numbers")
            fingerprint = meta["fingerprint"]
            vocabulary = cls(keys, int64_values(counts), unknown=meta["unknown"], dropped=meta["dropped"])
        except FileNotFoundError:
            raise ArtifactError(f"{path}: there is no such file") from None
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: is not a readable vocabulary file ({error})") from None
        if vocabulary.fingerprint != fingerprint:
            raise ArtifactError(f"{path}: is damaged: its contents do not have the fingerprint written with them")
        return vocabulary

    def _find_text(self, key: str) -> int:
        try:
            text = np.frombuffer(key.encode(), dtype=np.uint8)
        except UnicodeEncodeError:  # a lone surrogate: no text of a file can be this key
            return -1
        return int(self._kernels.find_one_bytes(text, *self._columns, self._slots))

    def _rows_of_objects(self, keys: Sequence[Any]) -> npt.NDArray[np.int64]:
        if len(keys) <= _FEW_KEYS:
            return np.array([self.row(key) for key in keys], dtype=np.int64)
        own = int if self.key_type == "int64" else str
        if set(map(type, keys)) == {own}:
            try:
                return self.rows(pa.array(keys, type=self.keys.type))
            except (pa.ArrowException, OverflowError, UnicodeEncodeError):
                pass  # some keys cannot be in any vocabulary: look at each alone
        return np.fromiter(map(self.row, keys), dtype=np.int64, count=len(keys))


class _Int64Counter:
    """Distinct int64 keys in order of appearance, with their counts, in arrays that double when they are full."""

    type = pa.int64()

    def __init__(self) -> None:
        self.num_keys = 0
        self._keys = np.empty(1024, dtype=np.int64)
        self._counts = np.empty(1024, dtype=np.int64)
        self._slots = np.zeros(_num_slots(1024), dtype=np.uint64)

    def add(self, array: pa.Array) -> None:
        from embedding_service import hash_kernels as kernels

        chunk = int64_values(array)
        done = 0
        while True:
            done, self.num_keys = kernels.count_int64(chunk, done, self.num_keys, self._keys, self._counts, self._slots)
            if done == len(chunk):
                return
            self._keys = _grown(self._keys, 2 * self.num_keys)
            self._counts = _grown(self._counts, 2 * self.num_keys)
            self._slots = np.zeros(_num_slots(len(self._keys)), dtype=np.uint64)
            kernels.fill_int64(self._keys, self.num_keys, self._slots)

    def result(self) -> tuple[pa.Array, npt.NDArray[np.int64]]:
        return pa.array(self._keys[: self.num_keys]), self._counts[: self.num_keys]


class _StringCounter:
    """As `_Int64Counter`, for strings: key i is data[offsets[i] : offsets[i + 1]]."""

    type = pa.large_string()

    def __init__(self) -> None:
        self.num_keys = 0
        self._offsets = np.zeros(1025, dtype=np.int64)
        self._data = np.empty(16_384, dtype=np.uint8)
        self._counts = np.empty(1024, dtype=np.int64)
        self._slots = np.zeros(_num_slots(1024), dtype=np.uint64)

    def add(self, array: pa.Array) -> None:
        from embedding_service import hash_kernels as kernels

        offsets, data = string_bytes(array)
        done = 0
        while True:
            done, self.num_keys = kernels.count_bytes(
                offsets, data, done, self.num_keys, self._offsets, self._data, self._counts, self._slots
            )
            if done == len(array):
                return
            if self.num_keys == len(self._counts):
                self._counts = _grown(self._counts, 2 * self.num_keys)
                self._offsets = _grown(self._offsets, 2 * self.num_keys + 1)
                self._slots = np.zeros(_num_slots(len(self._counts)), dtype=np.uint64)
                kernels.fill_bytes(self._offsets, self._data, self.num_keys, self._slots)
            else:
                self._data = _grown(self._data, 2 * len(self._data) + int(offsets[done + 1] - offsets[done]))

    def result(self) -> tuple[pa.Array, npt.NDArray[np.int64]]:
        offsets = self._offsets[: self.num_keys + 1]
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self._data[: offsets[-1]])]
        return pa.Array.from_buffers(self.type, self.num_keys, buffers), self._counts[: self.num_keys]


def _columns(keys: pa.Array) -> tuple[npt.NDArray[Any], ...]:
    """The arrays that the kernels take for `keys`: (int64 values,) or (offsets, bytes)."""
    return (int64_values(keys),) if keys.type == pa.int64() else string_bytes(keys)


def _grown(values: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    out = np.empty(size, dtype=values.dtype)
    out[: len(values)] = values
    return out


def _num_slots(num_keys: int) -> int:
    """The power of two that keeps `num_keys` keys within the table's load, and at least one slot empty."""
    return 1 << int(num_keys / _MAX_LOAD).bit_length()


__all__ = ["Key", "KeyType", "Vocabulary", "stable_hash"]
