"""Stored vectors: one .npy file of fp32, fp16 or int8 rows (and one of int8's scales), mapped into memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from cluster.errors import ArtifactError
from embedding_service.exact import Float32
from embedding_service.quantize import DTYPES, Precision, decode, encode

SCALE_DTYPE = np.dtype("<f4")


class VectorSet:
    """Vectors of rows 0..rows - 1, decoded to float32 when they are taken."""

    def __init__(self, codes: npt.NDArray[Any], scale: npt.NDArray[np.float32] | None, precision: Precision) -> None:
        """codes: [rows, dim] of the precision's dtype; scale: float32 [rows] for int8, else None."""
        self.rows, self.dim = codes.shape
        self.precision: Precision = precision
        self._codes = codes
        self._scale = scale

    @classmethod
    def open(cls, file: Path, scale_file: Path | None, *, rows: int, dim: int, precision: Precision) -> VectorSet:
        """Map the files into memory. Raises ArtifactError if they are not exactly what is asked for."""
        codes = map_array(file, DTYPES[precision], (rows, dim))
        scale = None if scale_file is None else map_array(scale_file, SCALE_DTYPE, (rows,))
        return cls(codes, scale, precision)

    @property
    def stored(self) -> tuple[npt.NDArray[Any], Float32]:
        """The codes [rows, dim] as kernels take them, fp16 as its bits in uint16, and int8's scale [rows], else [0]."""
        codes = self._codes.view(np.uint16) if self.precision == "fp16" else self._codes
        return codes, np.empty(0, np.float32) if self._scale is None else self._scale

    @functools.cached_property
    def unit_factors(self) -> Float32:
        """float32 [rows]: what makes each row of `stored` a unit vector, with int8's scale; of zeros any number."""
        factors = np.empty(self.rows, np.float32)
        for start, chunk in self.chunks():
            lengths = np.sqrt(np.einsum("nd,nd->n", chunk, chunk, dtype=np.float64))
            scale = 1.0 if self._scale is None else self._scale[start : start + len(chunk)]
            factors[start : start + len(chunk)] = scale / np.maximum(lengths, 1e-30)
        return factors

    def take(self, rows: npt.NDArray[np.integer]) -> Float32:
        """float32 [*rows.shape, dim]. `rows` lie in 0..rows - 1."""
        vectors: Float32 = self._codes[rows].astype(np.float32)
        if self._scale is not None:
            vectors *= self._scale[rows][..., None]
        return vectors

    def chunks(self, size: int = 65_536) -> Iterator[tuple[int, Float32]]:
        """(first row, float32 [at most size, dim]) pairs that cover all rows in order."""
        for start in range(0, self.rows, size):
            part = slice(start, start + size)
            yield start, decode(self._codes[part], None if self._scale is None else self._scale[part])

    def head(self, rows: int) -> VectorSet:
        """The first `rows` rows."""
        return self.part(range(rows))

    def part(self, rows: range) -> VectorSet:
        """The rows of a range of step 1, numbered from 0."""
        part = slice(rows.start, rows.stop)
        return VectorSet(self._codes[part], None if self._scale is None else self._scale[part], self.precision)


class VectorSink:
    """Writes a vector set, any rows at a time, each row exactly once."""

    def __init__(
        self, file: Path, scale_file: Path | None, *, rows: int, dim: int, precision: Precision, normalized: bool
    ) -> None:
        self.rows, self.dim, self.precision, self.normalized = rows, dim, precision, normalized
        self._name = file.stem
        self._codes = _ArrayFile(file, DTYPES[precision], (rows, dim))
        self._scale = None if scale_file is None else _ArrayFile(scale_file, SCALE_DTYPE, (rows,))
        self._spans: list[tuple[int, int]] = []

    def write(self, start_row: int, vectors: Float32) -> None:
        """Store float [n, dim] as rows start_row..start_row + n - 1.

        Raises ArtifactError for nan or infinite values and values beyond the precision's range, and ValueError for a
        wrong shape, rows outside the set and, if the set is promised to be normalised, a length that is neither 1
        nor 0.
        """
        stop = start_row + len(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"vector set {self._name}: wants [n, {self.dim}]; got {list(vectors.shape)}")
        if start_row < 0 or stop > self.rows:
            raise ValueError(f"vector set {self._name}: rows {start_row}..{stop - 1} are not all in 0..{self.rows - 1}")
        codes, scale = encoded_rows(self._name, start_row, vectors, self.precision, normalized=self.normalized)
        self.write_codes(start_row, codes, scale)

    def write_codes(self, start_row: int, codes: npt.NDArray[Any], scale: Float32 | None) -> None:
        """Store what `encoded_rows` made of rows start_row..start_row + n - 1."""
        stop = start_row + len(codes)
        self._codes.write(start_row, codes)
        if self._scale is not None:
            assert scale is not None
            self._scale.write(start_row, scale)
        self._spans.append((start_row, stop))

    def close(self) -> None:
        """Raises ArtifactError unless every row was written exactly once."""
        end = 0
        for start, stop in sorted(span for span in self._spans if span[0] < span[1]):
            if start != end:
                problem = "was never written" if start > end else "was written twice"
                raise ArtifactError(f"vector set {self._name}: row {min(start, end)} {problem}")
            end = stop
        if end != self.rows:
            raise ArtifactError(f"vector set {self._name}: row {end} was never written")
        self._codes.close()
        if self._scale is not None:
            self._scale.close()


class _ArrayFile:
    """An .npy file that is written in parts. Not mapped into memory: what is written would count as memory in use."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self._dtype = dtype
        self._row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close(), or with the sink that holds it
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)
        self._begin = self._file.tell()
        self._file.truncate(self._begin + shape[0] * self._row_bytes)

    def write(self, start_row: int, rows: npt.NDArray[Any]) -> None:
        self._file.seek(self._begin + start_row * self._row_bytes)
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)

    def close(self) -> None:
        self._file.close()


def encoded_rows(
    name: str, start_row: int, vectors: Float32, precision: Precision, *, normalized: bool
) -> tuple[npt.NDArray[Any], Float32 | None]:
    """`quantize.encode` of rows start_row.. of the vector set `name`.

    Raises ArtifactError for nan or infinite values and values beyond the precision's range, and ValueError, if the set
    is promised to be normalised, for a length that is neither 1 nor 0.
    """
    try:
        codes, scale = encode(vectors, precision)
    except ValueError as error:
        raise ArtifactError(f"vector set {name}, from row {start_row} on: {error}; was the training sound?") from None
    if normalized:
        norms = np.linalg.norm(vectors, axis=1)
        wrong = np.flatnonzero((np.abs(norms - 1) > 1e-3) & (norms != 0))
        if len(wrong):
            raise ValueError(f"vector set {name}: row {start_row + wrong[0]} has length {norms[wrong[0]]:g}, not 1")
    return codes, scale


def row_ranges(rows: int, shards: int) -> list[range]:
    """0..rows - 1 in `shards` ranges whose sizes differ by one at most; some are empty where there are more shards."""
    ends = [rows * number // shards for number in range(shards + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def map_array(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The array of an .npy file, memory-mapped, after its header and size are held against what is expected."""
    try:
        with open(file, "rb") as handle:
            version = npy.read_magic(handle)
            if version != (1, 0):
                raise ValueError(f"format version {version}")
            found = npy.read_array_header_1_0(handle)
            offset = handle.tell()
            size = handle.seek(0, 2)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: is not an .npy file of vectors ({error})") from None
    if found != (shape, False, dtype):
        raise ArtifactError(f"{file}: holds {found[2]} {list(found[0])}, the manifest says {dtype} {list(shape)}")
    if size != offset + int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ArtifactError(f"{file}: has {size} bytes, which is not its header and {list(shape)} values")
    mapped = np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape)
    return mapped.view(np.ndarray)  # the same memory without memmap's slower indexing
