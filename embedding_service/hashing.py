"""Stable hashes of keys: the same number on every machine, in every process and version, pinned by golden values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.errors import DataError


def stable_hash(keys: pa.Array | npt.NDArray[Any], *, seed: int = 0) -> npt.NDArray[np.uint64]:
    """Hashes of `keys` (int64 or string, no nulls; see `key_array` for what is accepted), uint64 [n].

    - int64: the first output of splitmix64 (Steele, Lea, Flood 2014) with the key as its state; a `seed` other than 0
      is whitened by the same finaliser and xor-ed into that state. A bijection for every seed: no two keys collide.
    - string: XXH64 (Collet) of the UTF-8 bytes with `seed`.

    The two are different functions: 7 and "7" have unrelated hashes. Not for use against an adversary.
    Raises DataError for keys of another type or null keys, ValueError for a seed outside [0, 2**64).
    """
    from embedding_service import hash_kernels

    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64); got {seed}")
    array = key_array(keys)
    if array.null_count:
        raise DataError("a null key has no hash")
    out = np.empty(len(array), dtype=np.uint64)
    if array.type == pa.int64():
        hash_kernels.hash_int64(int64_values(array), np.uint64(seed), out)
    else:
        hash_kernels.hash_bytes(*string_bytes(array), np.uint64(seed), out)
    return out


def key_array(keys: pa.Array | pa.ChunkedArray | npt.NDArray[Any]) -> pa.Array:
    """`keys` as an Arrow array of one of the two key types, int64 or large_string; nulls stay null.

    Accepts Arrow arrays of any integer, string or dictionary type and NumPy arrays of integers or strings.
    Raises DataError for any other type and for unsigned keys of 2**63 or more.
    """
    array = pa.array(keys) if isinstance(keys, np.ndarray) else keys
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if kind in (pa.int64(), pa.large_string()):
        return array
    if pa.types.is_integer(kind):
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise DataError(f"keys must fit int64: {error}") from None
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return array.cast(pa.large_string())
    raise DataError(f"keys must be integers or strings; these are {kind}")


def int64_values(array: pa.Array) -> npt.NDArray[np.int64]:
    """The values of an int64 array, read-only int64 [n], without a copy; those of nulls are arbitrary."""
    values = np.frombuffer(_buffer(array, 1), dtype=np.int64)[array.offset : array.offset + len(array)]
    return _read_only(values)


def string_bytes(array: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Offsets, int64 [n + 1], and bytes, uint8, of a large_string array, both read-only and without a copy.

    String i is bytes[offsets[i] : offsets[i + 1]]; offsets[0] need not be 0.
    """
    offsets = np.frombuffer(_buffer(array, 1), dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    if len(offsets) == 0:  # Arrow allows an empty array to have no offsets at all
        offsets = np.zeros(1, dtype=np.int64)
    return _read_only(offsets), _read_only(np.frombuffer(_buffer(array, 2), dtype=np.uint8))


def _buffer(array: pa.Array, index: int) -> pa.Buffer | bytes:
    return array.buffers()[index] or b""


def _read_only(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    values.flags.writeable = False
    return values
