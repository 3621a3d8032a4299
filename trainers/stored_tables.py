"""A checkpoint's tables, read where they lie: rows are mapped from the shards' files, nothing is loaded whole.

A piece of a shard is what torch.save has written: a zip archive with the bytes of the tensor, uncompressed, in
`archive/data/0`. Which rows of which table are where says `tensors.json`. No process group and no pickle is needed.
"""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.errors import CheckpointError
from embedding_service.tables import TableSpec, check_names

_DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


class StoredTables:
    """What `ShardedTables` is to a model that only looks rows up. Safe to use from many threads."""

    def __init__(self, folder: Path, specs: Sequence[TableSpec]) -> None:
        """Raises CheckpointError if the checkpoint in `folder` has no such tables, or they are damaged."""
        check_names(specs)
        self.specs = {spec.name: spec for spec in specs}
        self.device = torch.device("cpu")
        try:
            described = json.loads((folder / "tensors.json").read_text())
            self._shards = {spec.name: _shards(folder, described, spec) for spec in specs}
            self._first = {name: np.array([first for first, _ in shards]) for name, shards in self._shards.items()}
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"checkpoint {folder}: its tables cannot be read ({error})") from None

    def route(self, ids: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As `ShardedTables.route`."""
        return ids

    def lookup(self, asked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of each table: table -> int64 [n] gives table -> float32 [n, dim]."""
        return {name: torch.from_numpy(self._rows(name, rows.numpy())) for name, rows in asked.items()}

    def _rows(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        spec, shards = self.specs[name], self._shards[name]
        out = np.empty((len(rows), spec.dim), np.float32)
        owner = np.searchsorted(self._first[name], rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        begins = np.flatnonzero(np.diff(owner[order], prepend=-1))
        for begin, end in itertools.pairwise([*begins, len(rows)]):
            members = order[begin:end]
            first, weights = shards[owner[members[0]]]
            out[members] = weights[rows[members] - first]
        return out


def _shards(folder: Path, described: Any, spec: TableSpec) -> list[tuple[int, npt.NDArray[Any]]]:
    """(first row, its rows) of every piece of a table's shards, ascending. Raises ValueError, KeyError."""
    name = f"tables.weight.{spec.name}"
    tensor = described["tensors"][name]
    if tensor["size"] != [spec.rows, spec.dim]:
        raise ValueError(f"table {spec.name} is {tensor['size']}, not {[spec.rows, spec.dim]}")
    sizes = {tuple(offsets): sizes for offsets, sizes in tensor["chunks"]}
    shards = []
    for place in described["places"]:
        if place["tensor"] == name:
            offset = tuple(place["chunk_offset"])
            shards.append((offset[0], _mapped(folder, place, sizes[offset], _DTYPES[tensor["dtype"]])))
    shards.sort(key=lambda shard: shard[0])
    end = 0
    for first, weights in shards:
        if first != end or weights.shape[1] != spec.dim:
            raise ValueError(f"the shards of table {spec.name} do not follow each other at row {end}")
        end += len(weights)
    if end != spec.rows:
        raise ValueError(f"the shards of table {spec.name} end at row {end} of {spec.rows}")
    return shards


def _mapped(folder: Path, place: Mapping[str, Any], size: Sequence[int], dtype: np.dtype) -> npt.NDArray[Any]:
    """The tensor of one place, mapped into memory."""
    if Path(place["file"]).name != place["file"]:
        raise ValueError(f"{place['file']!r} is not a file of the checkpoint")
    file = folder / place["file"]
    with open(file, "rb") as handle:
        archive = zipfile.ZipFile(_Part(handle, place["offset"], place["length"]))
        (entry,) = [one for one in archive.infolist() if one.filename.endswith("/data/0")]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != int(np.prod(size)) * dtype.itemsize:
            raise ValueError(f"{place['file']} does not hold {list(size)} {dtype} at {place['offset']}")
        handle.seek(place["offset"] + entry.header_offset + 26)  # the lengths in the entry's own header may differ
        lengths = np.frombuffer(handle.read(4), "<u2")
    start = place["offset"] + entry.header_offset + 30 + int(lengths.sum())
    return np.memmap(file, dtype=dtype, mode="r", offset=start, shape=tuple(size)).view(np.ndarray)


class _Part(io.RawIOBase):
    """`length` bytes of a file from `start` on, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if self._place < 0:
            raise ValueError(f"there is nothing before the beginning ({self._place})")
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._place)
        found = self._file.read(max(0, min(len(buffer), self._length - self._place)))
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)
