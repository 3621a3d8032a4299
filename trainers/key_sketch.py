"""What can be said of a stream of keys without keeping them: how many there are, how skewed, which are frequent.

Two sketches of Apache DataSketches, each of bounded size whatever the stream, and each the same up to its stated error
however the stream is cut and merged: a uniform sample of the distinct keys with the exact count of each (a tuple
sketch: Dasgupta, Lang, Rhodes, Thaler 2016), and the most frequent keys with bounds of their counts (frequent items:
Anderson et al. 2017).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasketches as ds
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DataError
from embedding_service.hashing import key_array, stable_hash

_SAMPLE_LG = 17  # 2^17 sampled keys or more: a standard error of 0.28 % of the distinct keys, and about 20 MB
_FREQUENT_LG = 17  # about 98,000 frequent keys: bounds of 3.5 / 2^17 of the traffic at worst, and about 15 MB
_NO_LIMIT = 2**63 - 1  # every key is in the sample
_DEVIATIONS = 2  # bounds are two standard errors to each side, 95 % of the cases
_MIN_COUNTS = (1, 2, 3, 5, 10, 20, 50, 100)

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and the bounds that hold it: strictly where they come from counts, else with 95 % probability."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, eq=False)
class _Sample:
    """The distinct keys whose hash is below `limit`, of 2^63: hashes, uint64 [n], ascending, and counts, int64 [n]."""

    limit: int
    hashes: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def union(cls, samples: Sequence[_Sample]) -> _Sample:
        """Those of all streams together, as of one: below the lowest limit every key is in its stream's sample."""
        limit = min(sample.limit for sample in samples)
        hashes, index = np.unique(np.concatenate([sample.hashes for sample in samples]), return_inverse=True)
        counts = np.zeros(len(hashes), np.int64)
        np.add.at(counts, index, np.concatenate([sample.counts for sample in samples]))
        if np.searchsorted(hashes, np.uint64(limit)) > 2 << _SAMPLE_LG:
            limit = int(hashes[1 << _SAMPLE_LG])
        size = int(np.searchsorted(hashes, np.uint64(limit)))
        return cls(limit, hashes[:size], counts[:size])


class KeySketch:
    """A stream of int64 or string keys. Memory: about 50 MB at most, and the distinct keys of one chunk."""

    def __init__(self, key_type: Literal["int64", "string"]) -> None:
        self.key_type: Literal["int64", "string"] = key_type
        self.num_keys = 0  # with repetitions
        self._sketch = ds.update_tuple_sketch(ds.AccumulatorPolicy(), _SAMPLE_LG)
        self._merged: list[_Sample] = []  # of other streams
        self._frequent = ds.frequent_strings_sketch(_FREQUENT_LG)  # its like for objects is read in quadratic time

    @classmethod
    def of(cls, keys: pa.Array) -> KeySketch:
        """An empty sketch for keys of the type of `keys`."""
        return cls("int64" if key_array(keys).type == pa.int64() else "string")

    def add(self, keys: pa.Array) -> None:
        """Count `keys` (no nulls). Raises DataError for keys of another type."""
        array = key_array(keys)
        if (array.type == pa.int64()) != (self.key_type == "int64"):
            raise DataError(f"keys are {self.key_type} at first and {array.type} later; cast them to one type")
        found = pc.value_counts(array)
        distinct, counts = found.field("values"), found.field("counts").to_pylist()
        # Hashed by us, since the sketch would ignore the empty string; they need not be the keys themselves.
        for number, count in zip(stable_hash(distinct).view(np.int64).tolist(), counts, strict=True):
            self._sketch.update(number, count)
        for key, count in zip(distinct.cast(pa.large_string()).to_pylist(), counts, strict=True):
            self._frequent.update(key, count)
        self.num_keys += len(array)

    def merge(self, other: KeySketch) -> None:
        """Count the keys of `other` as well. Raises DataError for keys of another type."""
        if other.key_type != self.key_type:
            raise DataError(f"keys are {self.key_type} in one part and {other.key_type} in another")
        self._merged = [_Sample.union([*self._merged, other._sample()])]
        self._frequent.merge(other._frequent)
        self.num_keys += other.num_keys

    def state(self) -> dict[str, Any]:
        """The sketch as JSON types; `from_state` is the inverse, on any machine."""
        sample = self._sample()
        parts = {
            "hashes": sample.hashes.astype("<u8").tobytes(),
            "counts": sample.counts.astype("<i8").tobytes(),
            "frequent": self._frequent.serialize(),
        }
        text = {name: base64.b64encode(part).decode() for name, part in parts.items()}
        return {"key_type": self.key_type, "num_keys": self.num_keys, "limit": sample.limit, **text}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> KeySketch:
        sketch = cls(state["key_type"])
        sketch.num_keys = state["num_keys"]
        parts = {name: base64.b64decode(state[name]) for name in ("hashes", "counts", "frequent")}
        hashes, counts = np.frombuffer(parts["hashes"], "<u8"), np.frombuffer(parts["counts"], "<i8")
        sketch._merged = [_Sample(state["limit"], hashes.astype(np.uint64), counts.astype(np.int64))]
        sketch._frequent = ds.frequent_strings_sketch.deserialize(parts["frequent"])
        return sketch

    def _sample(self) -> _Sample:
        entries = np.array([(number, count) for number, count in self._sketch], np.uint64).reshape(-1, 2)
        own = _Sample(self._sketch.theta64, entries[:, 0], entries[:, 1].astype(np.int64))
        return _Sample.union([own, *self._merged])

    def summary(self) -> KeySummary:
        """What the sketch knows."""
        sample = self._sample()
        share, size = sample.limit / _NO_LIMIT, len(sample.hashes)
        error = _DEVIATIONS * math.sqrt(size * (1.0 - share)) / share
        found = self._frequent.get_frequent_items(ds.frequent_items_error_type.NO_FALSE_NEGATIVES, 0)
        convert = int if self.key_type == "int64" else str
        frequent = sorted(((convert(one[0]), one[2], one[3]) for one in found), key=lambda one: (-one[1], one[0]))
        return KeySummary(
            self.key_type,
            self.num_keys,
            Estimate(size / share, max(size, size / share - error), size / share + error),
            np.sort(sample.counts)[::-1].astype(np.float64),
            share,
            [one[0] for one in frequent],
            np.array([one[1] for one in frequent], np.float64),
            np.array([one[2] for one in frequent], np.float64),
        )


@dataclass(frozen=True, eq=False)
class KeySummary:
    """A sketch's distinct keys, and the counts it is sure of.

    counts: float64 [n], descending, of a sample of the distinct keys in which each is with probability `share`.
    frequent: the most frequent keys, with float64 [m] bounds of their counts, most frequent first.
    """

    key_type: str
    num_keys: int
    distinct: Estimate
    counts: Float64s
    share: float
    frequent: Sequence[int | str]
    frequent_low: Float64s
    frequent_high: Float64s

    def coverage(self, top: int) -> Estimate:
        """The share of all occurrences that are of the `top` most frequent keys: the narrower of two estimates."""
        if not self.num_keys or top >= self.distinct.high:
            return Estimate(1.0, 1.0, 1.0)
        return min(self._coverage_of_frequent(top), self._coverage_of_sample(top), key=lambda one: one.high - one.low)

    def _coverage_of_frequent(self, top: int) -> Estimate:
        error = float((self.frequent_high - self.frequent_low).max(initial=0.0))
        low = self.frequent_low[:top].sum() / self.num_keys
        beyond = max(0, top - len(self.frequent_high)) * error  # a key that the sketch has dropped has so many at most
        high = min(1.0, (np.sort(self.frequent_high)[::-1][:top].sum() + beyond) / self.num_keys)
        return Estimate(float(low + high) / 2, float(low), float(high))

    def _coverage_of_sample(self, top: int) -> Estimate:
        """1 - (sum over all keys of min(count, c) - top c) / occurrences, c being the count at rank `top`.

        Estimated by weighting each sampled key with 1 / share (Horvitz and Thompson 1952). A minimum is at most c, so
        the variance is small where `top` is large; to first order it is not changed by c being estimated too, as the
        expression is stationary in c (Rockafellar and Uryasev 2000, theorem 1).
        """
        rank = int(top * self.share)
        cut = float(self.counts[rank]) if rank < len(self.counts) else 0.0
        capped = np.minimum(self.counts, cut)
        covered = 1.0 - (capped.sum() / self.share - top * cut) / self.num_keys
        deviation = math.sqrt((1.0 - self.share) * float((capped**2).sum())) / self.share / self.num_keys
        low, value, high = np.clip(np.array([-1, 0, 1]) * _DEVIATIONS * deviation + covered, 0.0, 1.0)
        return Estimate(float(value), float(low), float(high))

    def coverage_table(self) -> list[tuple[int, Estimate]]:
        """(top, coverage) at 1, 2, 5, 10, 20... below the number of distinct keys, and at that number."""
        distinct = round(self.distinct.value)
        found: list[tuple[int, Estimate]] = []
        least = 0.0
        for top in [*ranks_to(distinct), distinct] if distinct else []:
            one = self.coverage(top) if top < distinct else Estimate(1.0, 1.0, 1.0)
            least = max(least, one.value)
            found.append((top, Estimate(least, min(one.low, least), max(one.high, least))))
        return found

    def num_at_least(self, min_count: int) -> Estimate:
        """How many distinct keys occur at least `min_count` times."""
        sampled = float((self.counts >= min_count).sum())
        deviation = math.sqrt(sampled * (1.0 - self.share)) / self.share
        value = sampled / self.share
        return Estimate(value, max(sampled, value - _DEVIATIONS * deviation), value + _DEVIATIONS * deviation)

    def to_dict(self) -> dict[str, Any]:
        """The report on this column, as JSON types."""
        coverage = self.coverage_table()
        exponent, misfit = fit_zipf([top for top, _ in coverage], [one.value for _, one in coverage])
        top = zip(self.frequent[:20], self.frequent_low, self.frequent_high, strict=False)
        return {
            "key_type": self.key_type,
            "occurrences": self.num_keys,
            "distinct": self.distinct.to_dict(),
            "zipf": {"exponent": exponent, "misfit": misfit},
            "coverage": [{"top": top, **one.to_dict()} for top, one in coverage],
            "min_count": [{"min_count": least, **self.num_at_least(least).to_dict()} for least in _MIN_COUNTS],
            "frequent": [{"key": key, "low": int(low), "high": int(high)} for key, low, high in top],
        }


def ranks_to(end: int) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50... below `end`."""
    for power in range(len(str(end))):
        yield from (rank * 10**power for rank in (1, 2, 5) if rank * 10**power < end)


def fit_zipf(tops: Sequence[int], coverage: Sequence[float]) -> tuple[float, float]:
    """The exponent s in [0, 3] for which keys with frequencies ~ rank ** -s cover most nearly what these do, and the
    largest difference: of the squares least over the points, the last of which is all keys.

    What is fitted is coverage and not the log-log slope, as coverage is what a plan asks.
    """
    if len(tops) < 3:
        return 0.0, 0.0
    ranks, wanted = np.array(tops, np.float64), np.array(coverage)

    def difference(exponent: float) -> Float64s:
        found: Float64s = zipf_mass(ranks, exponent) / zipf_mass(ranks[-1:], exponent) - wanted
        return found

    low, high = 0.0, 3.0
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-4:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if (difference(left) ** 2).sum() < (difference(right) ** 2).sum():
            high = right
        else:
            low = left
    exponent = (low + high) / 2
    return exponent, float(np.abs(difference(exponent)).max())


def zipf_mass(ranks: Float64s, exponent: float) -> Float64s:
    """Sum of r ** -exponent over r = 1..rank, for each of `ranks` [n]: the first 1000 terms one by one, the rest by
    the Euler-Maclaurin formula (to 1e-9 of the sum).
    """
    exact = np.cumsum(np.arange(1, 1001, dtype=np.float64) ** -exponent)
    first, last = 1000.0, np.maximum(ranks, 1000.0)
    if abs(exponent - 1.0) < 1e-9:
        integral = np.log(last / first)
    else:
        integral = (last ** (1.0 - exponent) - first ** (1.0 - exponent)) / (1.0 - exponent)
    ends = (last**-exponent - first**-exponent) / 2
    slope = exponent * (first ** (-exponent - 1.0) - last ** (-exponent - 1.0)) / 12
    found: Float64s = exact[np.minimum(ranks, 1000.0).astype(np.int64) - 1] + integral + ends + slope
    return found
