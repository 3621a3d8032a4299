"""Lists of different lengths as one flat array: what sessions, histories and pooled features are made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ragged:
    """n lists; list i is `values[offsets[i] : offsets[i + 1]]`.

    `values` is flat: an Arrow array (keys: int64 or large_string) or a numpy array (rows). `offsets` is int64 [n + 1]
    with offsets[0] == 0 and offsets[n] == len(values). All methods are vectorised and keep the kind of `values`.
    """

    values: Any  # pa.Array | npt.NDArray[Any]
    offsets: Offsets

    def __post_init__(self) -> None:
        assert self.offsets.dtype == np.int64
        assert self.offsets.ndim == 1
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.values)

    @classmethod
    def from_arrow(cls, lists: pa.Array) -> Ragged:
        """The lists of a list, large_list or fixed_size_list array; a null list becomes an empty one.

        The values are shared, not copied, unless a null list hides some. Raises TypeError for another type.
        """
        if isinstance(lists, pa.FixedSizeListArray):
            size = lists.type.list_size
            ragged = cls(
                lists.values.slice(lists.offset * size, len(lists) * size),
                np.arange(len(lists) + 1, dtype=np.int64) * size,
            )
        elif isinstance(lists, pa.ListArray | pa.LargeListArray):
            raw = lists.offsets.to_numpy().astype(np.int64)
            ragged = cls(lists.values.slice(raw[0], raw[-1] - raw[0]), raw - raw[0])
        else:
            raise TypeError(f"{lists.type} is not a list")
        if not lists.null_count:
            return ragged
        hidden = lists.is_null().to_numpy(zero_copy_only=False)
        starts, lengths = ragged.offsets[:-1], np.where(hidden, 0, ragged.lengths)
        return _gather(ragged.values, starts, lengths)

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[Any]], dtype: Any = np.int64) -> Ragged:
        """Python lists as a Ragged whose values are numpy of `dtype`, or Arrow if `dtype` is an Arrow type."""
        flat = [value for one in lists for value in one]
        values = pa.array(flat, dtype) if isinstance(dtype, pa.DataType) else np.array(flat, dtype)
        return cls(values, offsets_of(np.array([len(one) for one in lists], np.int64)))

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        """The lists of all `parts` (at least one, of one kind), in order."""
        if len(parts) == 1:
            return parts[0]
        values = [part.values for part in parts]
        joined = pa.concat_arrays(values) if isinstance(values[0], pa.Array) else np.concatenate(values)
        return cls(joined, offsets_of(np.concatenate([part.lengths for part in parts])))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Offsets:
        """int64 [n]"""
        return self.offsets[1:] - self.offsets[:-1]  # np.diff takes five times as long for one query

    def owners(self) -> Offsets:
        """int64 [len(values)]: the list that each value belongs to."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def slice(self, start: int, stop: int) -> Ragged:
        """Lists start..stop - 1, sharing the values."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(_cut(self.values, int(offsets[0]), int(offsets[-1])), offsets - offsets[0])

    def take(self, lists: npt.NDArray[np.integer[Any]]) -> Ragged:
        """The lists numbered `lists` (integer [m], in 0..n-1, repeats allowed), in that order."""
        return _gather(self.values, self.offsets[:-1][lists], self.lengths[lists])

    def tail(self, length: int) -> Ragged:
        """Every list cut to its last `length` values."""
        lengths = np.minimum(self.lengths, length)
        return _gather(self.values, self.offsets[1:] - lengths, lengths)

    def with_values(self, values: pa.Array | npt.NDArray[Any]) -> Ragged:
        """The same lengths over other values [len(values)], e.g. rows in the place of keys."""
        return Ragged(values, self.offsets)

    def keep(self, mask: npt.NDArray[np.bool_]) -> Ragged:
        """Without the values whose `mask` (bool [len(values)]) is false; lists may become empty, none goes away.

        The values are shared, not copied, where all stay.
        """
        if mask.all():
            return self
        kept = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        values = self.values.filter(pa.array(mask)) if isinstance(self.values, pa.Array) else self.values[mask]
        return Ragged(values, kept[self.offsets])

    def to_lists(self) -> list[list[Any]]:
        """Python lists, for messages and tests."""
        flat = self.values.to_pylist() if isinstance(self.values, pa.Array) else self.values.tolist()
        bounds = self.offsets.tolist()
        return [flat[start:stop] for start, stop in itertools.pairwise(bounds)]


def offsets_of(lengths: npt.NDArray[np.integer[Any]]) -> Offsets:
    """int64 [n + 1] offsets of lists with these lengths [n]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def take_values(values: pa.Array | npt.NDArray[Any] | Ragged, index: npt.NDArray[np.integer[Any]]) -> Any:
    """`values[index]`, Arrow, numpy or lists; int64 without nulls goes through numpy, which is the faster."""
    if isinstance(values, Ragged):
        return values.take(index)
    if not isinstance(values, pa.Array):
        return values[index]
    if values.type == pa.int64() and not values.null_count:
        return pa.array(values.to_numpy()[index])
    return values.take(pa.array(index))


def concat_values(parts: Iterable[pa.Array]) -> pa.Array:
    """Arrow arrays of one type (at least one) as one array."""
    listed = list(parts)
    return listed[0] if len(listed) == 1 else pa.concat_arrays(listed)


def _cut(values: pa.Array | npt.NDArray[Any], start: int, stop: int) -> Any:
    return values.slice(start, stop - start) if isinstance(values, pa.Array) else values[start:stop]


def _gather(values: pa.Array | npt.NDArray[Any], starts: Offsets, lengths: Offsets) -> Ragged:
    """The lists values[starts[i] : starts[i] + lengths[i]], one after the other."""
    offsets = offsets_of(lengths)
    index = np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths)
    return Ragged(take_values(values, index), offsets)
