"""Compiled kernels behind `hashing`, `keys` and `row_maps`: the two stable hashes, hashed rows, and an open-addressing
table of rows.

Importing this file loads numba and compiles (the first time on a machine) or reads from numba's cache the functions
below, so they import it when they are first used, not when they are imported. All kernels are in this
one file because numba notices a changed file, but not a change in another file that the cached code was inlined from.
They release the GIL and neither read nor write out of bounds for the arguments that `keys` gives them.

The table is `slots`, uint64 [power of two], linear probing from the low bits of a key's hash. A slot is 0 (empty) or

    top 24 bits of the hash << 40 | row + 1

so that a wrong key is almost always passed over without reading it; the key itself, in `keys` (int64) or in `offsets`
and `data` (the bytes of key i are data[offsets[i] : offsets[i + 1]]), decides on a hit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

MAX_ROWS = 2**40 - 1

_ROW_BITS = np.uint64(40)
_ROW_MASK = np.uint64(MAX_ROWS)
_ONE = np.uint64(1)

# splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014); reference code by
# S. Vigna, https://prng.di.unimi.it/splitmix64.c (public domain)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

# XXH64: Y. Collet, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
_PRIME_1 = np.uint64(0x9E3779B185EBCA87)
_PRIME_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_PRIME_3 = np.uint64(0x165667B19E3779F9)
_PRIME_4 = np.uint64(0x85EBCA77C2B2AE63)
_PRIME_5 = np.uint64(0x27D4EB2F165667C5)

_U64: Any = types.uint64
_I64: Any = types.int64
_INT64S = types.Array(types.int64, 1, "C")
_UINT64S = types.Array(types.uint64, 1, "C")
_PAIR: Any = types.Tuple((_I64, _I64))  # type: ignore[no-untyped-call]
_BYTES = types.Array(types.uint8, 1, "C")
_INT64S_IN = types.Array(types.int64, 1, "C", readonly=True)
_UINT64S_IN = types.Array(types.uint64, 1, "C", readonly=True)
_BYTES_IN = types.Array(types.uint8, 1, "C", readonly=True)


def _kernel(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """A function called from Python: compiled for these types once per machine, then read from numba's cache."""
    compiler: Callable[[Callable[..., Any]], Any] = njit(result(*arguments), nogil=True, cache=True)
    return compiler


# a function compiled into the kernels that call it; costs nothing where those are cached
_inner: Callable[[Callable[..., Any]], Any] = njit(nogil=True)


@_inner
def mix(value: Any, seed: Any) -> Any:
    """splitmix64's next(state = value), the whitened seed mixed in before the finaliser; plain splitmix64 at seed 0."""
    seed = (seed ^ (seed >> np.uint64(30))) * _MIX_1
    seed = (seed ^ (seed >> np.uint64(27))) * _MIX_2
    seed = seed ^ (seed >> np.uint64(31))
    value = (value + _GOLDEN) ^ seed
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@_inner
def _rotate(value: Any, bits: Any) -> Any:
    return (value << bits) | (value >> (np.uint64(64) - bits))


@_inner
def _round(accumulator: Any, lane: Any) -> Any:
    return _rotate(accumulator + lane * _PRIME_2, np.uint64(31)) * _PRIME_1


@_inner
def _little_endian(data: Any, start: Any, num_bytes: Any) -> Any:
    # unsigned positions spare numba's test for negative indices
    value = np.uint64(0)
    for i in range(num_bytes):
        value |= np.uint64(data[start + np.uint64(i)]) << (np.uint64(8) * np.uint64(i))
    return value


@_inner
def xxh64(data: Any, begin: Any, end: Any, seed: Any) -> Any:
    """XXH64 of data[begin:end]."""
    at, stop = np.uint64(begin), np.uint64(end)
    eight, four = np.uint64(8), np.uint64(4)
    if end - begin >= 32:
        a = seed + _PRIME_1 + _PRIME_2
        b = seed + _PRIME_2
        c = seed
        d = seed - _PRIME_1
        while at + np.uint64(32) <= stop:
            a = _round(a, _little_endian(data, at, eight))
            b = _round(b, _little_endian(data, at + np.uint64(8), eight))
            c = _round(c, _little_endian(data, at + np.uint64(16), eight))
            d = _round(d, _little_endian(data, at + np.uint64(24), eight))
            at += np.uint64(32)
        value = _rotate(a, np.uint64(1)) + _rotate(b, np.uint64(7))
        value += _rotate(c, np.uint64(12)) + _rotate(d, np.uint64(18))
        for lane in (a, b, c, d):
            value = (value ^ _round(np.uint64(0), lane)) * _PRIME_1 + _PRIME_4
    else:
        value = seed + _PRIME_5
    value += np.uint64(end - begin)
    while at + eight <= stop:
        value ^= _round(np.uint64(0), _little_endian(data, at, eight))
        value = _rotate(value, np.uint64(27)) * _PRIME_1 + _PRIME_4
        at += eight
    if at + four <= stop:
        value ^= _little_endian(data, at, four) * _PRIME_1
        value = _rotate(value, np.uint64(23)) * _PRIME_2 + _PRIME_3
        at += four
    while at < stop:
        value ^= np.uint64(data[at]) * _PRIME_5
        value = _rotate(value, np.uint64(11)) * _PRIME_1
        at += _ONE
    value = (value ^ (value >> np.uint64(33))) * _PRIME_2
    value = (value ^ (value >> np.uint64(29))) * _PRIME_3
    return value ^ (value >> np.uint64(32))


@_kernel(types.void, _INT64S_IN, _U64, _UINT64S)
def hash_int64(keys: Any, seed: Any, out: Any) -> None:
    for i in range(len(keys)):
        out[i] = mix(np.uint64(keys[i]), seed)


@_kernel(types.void, _INT64S_IN, _BYTES_IN, _U64, _UINT64S)
def hash_bytes(offsets: Any, data: Any, seed: Any, out: Any) -> None:
    for i in range(len(out)):
        out[i] = xxh64(data, offsets[i], offsets[i + 1], seed)


@_kernel(types.void, _INT64S_IN, _I64, _I64, _I64, _INT64S)
def hash_rows(ids: Any, head: Any, shared: Any, hashes: Any, out: Any) -> None:
    """Ids below `head` have one row, their own; the others `hashes` of the `shared` rows behind these, by seeds 1, 2...

    out: as many rows as that is for all `ids`, one id after the other.
    """
    at = 0
    for i in range(len(ids)):
        if ids[i] < head:
            out[at] = ids[i]
            at += 1
        else:
            for j in range(hashes):
                hashed = mix(np.uint64(ids[i]), np.uint64(j + 1))
                out[at] = head + np.int64(hashed % np.uint64(shared))
                at += 1


@_kernel(types.void, _INT64S_IN, _U64, _I64, _INT64S)
def hash_places(ids: Any, seed: Any, places: Any, out: Any) -> None:
    """out[i] = one of `places` places for ids[i]."""
    for i in range(len(ids)):
        out[i] = np.int64(mix(np.uint64(ids[i]), seed) % np.uint64(places))


@_inner
def _same_bytes(left: Any, left_start: Any, right: Any, right_start: Any, length: Any) -> Any:
    at, other = np.uint64(left_start), np.uint64(right_start)
    for i in range(np.uint64(length)):  # noqa: SIM110 (numba compiles the loop)
        if left[at + np.uint64(i)] != right[other + np.uint64(i)]:
            return False
    return True


@_inner
def _probe_int64(hashed: Any, key: Any, keys: Any, slots: Any) -> Any:
    """The row of `key`, or -(place of the empty slot where it belongs) - 1."""
    mask = np.uint64(len(slots) - 1)
    tag = hashed >> _ROW_BITS
    place = hashed & mask
    while slots[place] != 0:
        if slots[place] >> _ROW_BITS == tag:
            row = (slots[place] & _ROW_MASK) - _ONE
            if keys[row] == key:
                return np.int64(row)
        place = (place + _ONE) & mask
    return -np.int64(place) - 1


@_inner
def _probe_bytes(hashed: Any, query: Any, begin: Any, end: Any, offsets: Any, data: Any, slots: Any) -> Any:
    """The row of the key query[begin:end], or -(place of the empty slot where it belongs) - 1."""
    mask = np.uint64(len(slots) - 1)
    tag = hashed >> _ROW_BITS
    place = hashed & mask
    while slots[place] != 0:
        if slots[place] >> _ROW_BITS == tag:
            row = (slots[place] & _ROW_MASK) - _ONE
            start = offsets[row]
            if offsets[row + _ONE] - start == end - begin and _same_bytes(data, start, query, begin, end - begin):
                return np.int64(row)
        place = (place + _ONE) & mask
    return -np.int64(place) - 1


@_inner
def _slot(hashed: Any, row: Any) -> Any:
    return ((hashed >> _ROW_BITS) << _ROW_BITS) | np.uint64(row + 1)


@_kernel(_I64, _INT64S_IN, _I64, _UINT64S)
def fill_int64(keys: Any, num_keys: Any, slots: Any) -> Any:
    """Enter keys[:num_keys] into zeroed `slots`; the row of the first key that is there already, or -1."""
    for row in range(num_keys):
        hashed = mix(np.uint64(keys[row]), np.uint64(0))
        place = _probe_int64(hashed, keys[row], keys, slots)
        if place >= 0:
            return row
        slots[-place - 1] = _slot(hashed, row)
    return -1


@_kernel(_I64, _INT64S_IN, _BYTES_IN, _I64, _UINT64S)
def fill_bytes(offsets: Any, data: Any, num_keys: Any, slots: Any) -> Any:
    """As `fill_int64`, for the keys data[offsets[i] : offsets[i + 1]]."""
    for row in range(num_keys):
        hashed = xxh64(data, offsets[row], offsets[row + 1], np.uint64(0))
        place = _probe_bytes(hashed, data, offsets[row], offsets[row + 1], offsets, data, slots)
        if place >= 0:
            return row
        slots[-place - 1] = _slot(hashed, row)
    return -1


@_kernel(types.void, _INT64S_IN, _I64, _INT64S_IN, _UINT64S_IN, _INT64S)
def find_int64(queries: Any, unknown: Any, keys: Any, slots: Any, out: Any) -> None:
    """out[i] = the row of queries[i], or `unknown`."""
    for i in range(len(queries)):
        row = _probe_int64(mix(np.uint64(queries[i]), np.uint64(0)), queries[i], keys, slots)
        out[i] = row if row >= 0 else unknown


@_kernel(types.void, _INT64S_IN, _BYTES_IN, _I64, _INT64S_IN, _BYTES_IN, _UINT64S_IN, _INT64S)
def find_bytes(
    query_offsets: Any, query_data: Any, unknown: Any, offsets: Any, data: Any, slots: Any, out: Any
) -> None:
    """out[i] = the row of query_data[query_offsets[i] : query_offsets[i + 1]], or `unknown`."""
    for i in range(len(out)):
        begin, end = query_offsets[i], query_offsets[i + 1]
        hashed = xxh64(query_data, begin, end, np.uint64(0))
        row = _probe_bytes(hashed, query_data, begin, end, offsets, data, slots)
        out[i] = row if row >= 0 else unknown


@_kernel(_I64, _I64, _INT64S_IN, _UINT64S_IN)
def find_one_int64(key: Any, keys: Any, slots: Any) -> Any:
    """The row of `key`, or a negative number."""
    return _probe_int64(mix(np.uint64(key), np.uint64(0)), key, keys, slots)


@_kernel(_I64, _BYTES_IN, _INT64S_IN, _BYTES_IN, _UINT64S_IN)
def find_one_bytes(key: Any, offsets: Any, data: Any, slots: Any) -> Any:
    """The row of `key`, or a negative number."""
    return _probe_bytes(xxh64(key, 0, len(key), np.uint64(0)), key, 0, len(key), offsets, data, slots)


@_kernel(_PAIR, _INT64S_IN, _I64, _I64, _INT64S, _INT64S, _UINT64S)
def count_int64(chunk: Any, start: Any, num_keys: Any, keys: Any, counts: Any, slots: Any) -> Any:
    """Count chunk[start:], entering new keys after the `num_keys` known ones.

    Returns (position, num_keys): position < len(chunk) is the first key that `keys` and `counts` have no room for.
    """
    for i in range(start, len(chunk)):
        hashed = mix(np.uint64(chunk[i]), np.uint64(0))
        row = _probe_int64(hashed, chunk[i], keys, slots)
        if row < 0:
            if num_keys == len(keys):
                return i, num_keys
            slots[-row - 1] = _slot(hashed, num_keys)
            keys[num_keys] = chunk[i]
            counts[num_keys] = 0
            row = num_keys
            num_keys += 1
        counts[row] += 1
    return len(chunk), num_keys


@_kernel(_PAIR, _INT64S_IN, _BYTES_IN, _I64, _I64, _INT64S, _BYTES, _INT64S, _UINT64S)
def count_bytes(
    chunk_offsets: Any, chunk: Any, start: Any, num_keys: Any, offsets: Any, data: Any, counts: Any, slots: Any
) -> Any:
    """As `count_int64`; stops as well where `data` has no room for the bytes of a new key."""
    for i in range(start, len(chunk_offsets) - 1):
        begin, end = chunk_offsets[i], chunk_offsets[i + 1]
        hashed = xxh64(chunk, begin, end, np.uint64(0))
        row = _probe_bytes(hashed, chunk, begin, end, offsets, data, slots)
        if row < 0:
            used = offsets[num_keys]
            if num_keys == len(counts) or used + end - begin > len(data):
                return i, num_keys
            slots[-row - 1] = _slot(hashed, num_keys)
            for j in range(end - begin):
                data[used + j] = chunk[begin + j]
            offsets[num_keys + 1] = used + end - begin
            counts[num_keys] = 0
            row = num_keys
            num_keys += 1
        counts[row] += 1
    return len(chunk_offsets) - 1, num_keys
