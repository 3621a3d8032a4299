"""What a FAISS file says of itself, checked before FAISS reads it: FAISS believes sizes, and graphs' row numbers.

Format: the write functions of faiss/impl/index_write.cpp, little-endian. Looked at: the header of every kind; all of a
flat index's size; all of an HNSW graph's arrays. What lies deeper in a file (inverted lists, codebooks) is FAISS's own
to check; an artifact is therefore loaded and asked in a process of its own first, see `admission`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from cluster.errors import ArtifactError

_FLAT = (b"IxFI", b"IxF2", b"IxFl")
_HNSW = (b"IHNf", b"IHNs", b"IHNp", b"IHN2")
_HEADER = struct.Struct("<iqqq?i")
_KINDS = (*_FLAT, *_HNSW)
_PREFIXES = (b"Ix", b"IH", b"Iw", b"Iv", b"IN", b"IM")  # of the fourcc of any float index


def check_index_file(file: Path, *, rows: int, width: int) -> None:
    """Raise ArtifactError if the file cannot be a FAISS index of `rows` vectors with `width` components."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        reader = _Reader(handle, file, size)
        kind = reader.take(4)
        if not kind.startswith(_PREFIXES):
            reader.refuse(f"is no FAISS index (it begins with {kind!r})")
        if kind.startswith(b"IH") and kind not in _HNSW:
            reader.refuse(f"is a graph of a kind that is not read here ({kind!r})")
        d, ntotal, _, _, _, metric = _HEADER.unpack(reader.take(_HEADER.size))
        if (d, ntotal) != (width, rows):
            reader.refuse(f"says it has {ntotal} vectors of {d} components; the manifest says {rows} of {width}")
        if metric not in (0, 1):
            reader.refuse(f"has metric {metric}; inner product is 0, L2 is 1")
        if kind in _FLAT:
            codes = reader.count(4)
            if codes != rows * width or reader.left != 4 * codes:
                reader.refuse(f"holds {codes} numbers in {reader.left} bytes, not {rows} x {width}")
        elif kind in _HNSW:
            _check_graph(reader, rows)


def _check_graph(reader: _Reader, rows: int) -> None:
    """HNSW's arrays: levels, where each row's neighbours begin, and the neighbours, which are rows or -1."""
    reader.array("<f8")  # probabilities of the levels
    per_level = reader.array("<i4")
    levels, offsets, neighbours = reader.array("<i4"), reader.array("<u8"), reader.array("<i4")
    entry, top = struct.unpack("<ii", reader.take(8))
    if len(levels) != rows or len(offsets) != rows + 1:
        reader.refuse(f"its graph has {len(levels)} levels and {len(offsets)} offsets for {rows} vectors")
    if len(per_level) < 1 or (np.diff(per_level) < 0).any() or per_level[0] < 0:
        reader.refuse("its graph's numbers of neighbours per level are not ascending")
    if levels.min(initial=1) < 1 or levels.max(initial=1) >= len(per_level):
        reader.refuse("its graph has levels that it does not describe")
    # FAISS writes levels as counts; searching from `top` reads the number of neighbours below top + 1
    if (
        not -1 <= entry < rows
        or (entry < 0) != (top < 0)
        or not -1 <= top <= len(per_level) - 2
        or (entry >= 0 and levels[entry] != top + 1)
    ):
        reader.refuse(f"its graph is entered at row {entry}, level {top}")
    if not np.array_equal(offsets, np.append(0, np.cumsum(per_level[levels], dtype=np.uint64))):
        reader.refuse("its graph's offsets are not the sums of its levels' neighbours")
    if len(neighbours) != int(offsets[-1]):
        reader.refuse(f"its graph has {len(neighbours)} neighbours, its offsets end at {int(offsets[-1])}")
    for start in range(0, len(neighbours), 2**22):
        part = neighbours[start : start + 2**22]
        if part.min() < -1 or part.max() >= rows:
            reader.refuse("its graph leads to rows that do not exist")


class _Reader:
    def __init__(self, handle: BinaryIO, file: Path, size: int) -> None:
        self._handle, self._file, self._size = handle, file, size

    @property
    def left(self) -> int:
        return self._size - self._handle.tell()

    def take(self, num: int) -> bytes:
        data = self._handle.read(num)
        if len(data) != num:
            self.refuse("ends in the middle")
        return data

    def count(self, item_bytes: int) -> int:
        """The length of an array that follows; refused if the file is too short for it."""
        (num,) = struct.unpack("<Q", self.take(8))
        if num * item_bytes > self.left:
            self.refuse(f"says that {num} numbers follow, but has {self.left} bytes left")
        return int(num)

    def array(self, dtype: str) -> np.ndarray[Any, Any]:
        item = np.dtype(dtype)
        num = self.count(item.itemsize)
        place = self._handle.tell()
        self._handle.seek(num * item.itemsize, 1)
        if num == 0:
            return np.empty(0, item)
        return np.memmap(self._file, item, "r", place, (num,))

    def refuse(self, problem: str) -> NoReturn:
        raise ArtifactError(f"{self._file}: {problem}")
