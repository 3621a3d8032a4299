"""What a table is: its specification, its initial rows, and the deduplication of what is looked up in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np

Precision = Literal["fp32", "fp16"]
Optimizer = Literal["rowwise_adagrad", "adagrad", "sgd"]
Kernel = Literal["fused", "fused_uvm_caching"]

_BYTES = {"fp32": 4, "fp16": 2}
_DIGIT_BITS = 11  # of a radix sort: its counters fit the CPU's first cache
_DIGIT = np.uint64((1 << _DIGIT_BITS) - 1)


@dataclass(frozen=True)
class TableSpec:
    """One embedding table: `rows` x `dim` weights that start uniform in +-`init_scale` (0: all zeros).

    folder: where it lies on local disk; empty: in memory. frozen: its rows are never updated.
    """

    name: str
    rows: int
    dim: int
    init_scale: float
    precision: Precision = "fp32"
    folder: str = ""
    frozen: bool = False
    kernel: Kernel = "fused"  # where it lies: see cluster.uvm_caching

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"table {self.name} needs at least one row; got {self.rows}")
        if self.dim % 4:
            raise ValueError(f"table {self.name}: FBGEMM needs a dimension divisible by 4; got {self.dim}")

    def num_bytes(self, optimizer: Optimizer) -> int:
        """Bytes of weights and optimiser state (row-wise Adagrad: one float32 a row; Adagrad: one a weight)."""
        return self.weight_bytes(self.rows) + self.state_bytes(optimizer, self.rows)

    def weight_bytes(self, rows: int) -> int:
        """Bytes of the weights of so many rows."""
        return rows * self.dim * _BYTES[self.precision]

    def state_bytes(self, optimizer: Optimizer, rows: int) -> int:
        """Bytes of the optimiser state of so many rows."""
        return rows * {"sgd": 0, "rowwise_adagrad": 4, "adagrad": 4 * self.dim}[optimizer]


def initial_rows(spec: TableSpec, seed: int, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a new table: float32 [stop - start, dim].

    A pure function of (seed, table name, row, column), so that it does not depend on how the table is sharded:
    splitmix64 (Steele, Lea, Flood 2014) of the element's number, its upper 24 bits as a uniform number.
    """
    out = np.empty((stop - start, spec.dim), np.float32)
    if spec.init_scale == 0.0:
        out.fill(0.0)
    else:
        name = int.from_bytes(hashlib.blake2b(spec.name.encode(), digest_size=8).digest(), "little")
        key = np.uint64((seed + name) % 2**64)
        _fill_uniform(out.reshape(-1), np.uint64(start * spec.dim), key, np.float32(spec.init_scale))
    return out


@numba.njit("void(float32[::1], uint64, uint64, float32)", nogil=True, cache=True)
def _fill_uniform(out: np.ndarray, first: np.uint64, key: np.uint64, scale: np.float32) -> None:
    base = key * np.uint64(0xD1342543DE82EF95)
    for i in range(out.size):
        z = base + (first + np.uint64(i) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        unit = np.float32(z >> np.uint64(40)) * np.float32(2.0**-24)
        out[i] = (np.float32(2.0) * unit - np.float32(1.0)) * scale


def deduplicate(uses: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The distinct rows of several uses of one table, ascending, and each use as an index into them.

    uses: name -> int64 [n], from 0 on. Returns (int64 [u], name -> int64 [n]). Distinct rows make the exchange between
    workers small and give the optimiser one gradient per row; ascending ones of a rank's shard lie together, and a
    table is read and written from its beginning to its end.
    """
    rows = np.concatenate([np.empty(0, np.int64), *uses.values()])
    unique, inverse = _distinct(rows)
    assert not len(unique) or unique[-1] >= 0, "rows count from 0"
    ends = np.cumsum([len(rows) for rows in uses.values()], dtype=np.int64)
    return unique, {name: inverse[end - len(uses[name]) : end] for name, end in zip(uses, ends, strict=True)}


@numba.njit("Tuple((int64[::1], int64[::1]))(int64[::1], int64)", nogil=True, cache=True)
def _distinct_of_few(rows: np.ndarray, highest: np.int64) -> tuple[np.ndarray, np.ndarray]:
    """`_distinct` for rows up to `highest`, of which memory is taken for each."""
    place = np.zeros(highest + 1, np.int64)
    for i in range(rows.size):
        place[np.uint64(rows[i])] = 1
    num = 0
    for row in range(highest + 1):
        num += place[row]
    unique = np.empty(num, np.int64)
    num = 0
    for row in range(highest + 1):
        if place[row]:
            place[row], unique[num] = num, row
            num += 1
    inverse = np.empty(rows.size, np.int64)
    for i in range(rows.size):
        inverse[i] = place[np.uint64(rows[i])]
    return unique, inverse


@numba.njit("Tuple((int64[::1], int64[::1]))(int64[::1])", nogil=True, cache=True)
def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique(rows, return_inverse=True) of rows from 0 on, linear in their number: by a mark for every row there
    could be where these are few, else by a radix sort.
    """
    count = rows.size
    highest = np.uint64(0)
    for i in range(count):
        highest = max(highest, np.uint64(rows[i]))
    if highest < np.uint64(2 * count):
        return _distinct_of_few(rows, np.int64(highest))
    values, places = rows.astype(np.uint64), np.arange(count)
    other_values, other_places = np.empty(count, np.uint64), np.empty(count, np.int64)
    shift = np.uint64(0)
    while shift < np.uint64(64) and highest >> shift > np.uint64(0):
        starts = np.zeros((1 << _DIGIT_BITS) + 1, np.int64)
        for i in range(count):
            starts[((values[i] >> shift) & _DIGIT) + np.uint64(1)] += 1
        for digit in range(1 << _DIGIT_BITS):
            starts[digit + 1] += starts[digit]
        for i in range(count):
            digit = (values[i] >> shift) & _DIGIT
            place = starts[digit]
            starts[digit] = place + 1
            other_values[place], other_places[place] = values[i], places[i]
        values, other_values = other_values, values
        places, other_places = other_places, places
        shift += np.uint64(_DIGIT_BITS)
    unique = np.empty(count, np.int64)
    inverse = np.empty(count, np.int64)
    num = 0
    for i in range(count):
        if i == 0 or values[i] != values[i - 1]:
            unique[num] = np.int64(values[i])
            num += 1
        inverse[places[i]] = num - 1
    return unique[:num].copy(), inverse


def check_names(specs: Sequence[TableSpec]) -> None:
    """Raises ValueError where two tables share a name."""
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ValueError(f"table names must differ: {names}")
