"""How often the ids of a table are asked for, and what follows for the rows of a step and for rows that ids share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedding_service.row_maps import RowMap
from trainers.key_sketch import zipf_mass

Float64s = npt.NDArray[np.float64]
_STEP = 1.2  # ratio of the ranks between which a distribution is taken as flat


@dataclass(frozen=True, eq=False)
class KeyDistribution:
    """Groups of ids that are asked for equally often: float64 sizes [n] (ids), shares [n] (of all lookups; sum 1)."""

    sizes: Float64s
    shares: Float64s
    source: str  # where it comes from, for a reader

    @classmethod
    def zipf(cls, ids: int, exponent: float) -> KeyDistribution:
        """Frequency ~ rank ** -exponent: an assumption."""
        ends = _ranks(ids)
        return cls._of(ends, zipf_mass(ends, exponent), f"assumed: Zipf, exponent {exponent:g}")

    @classmethod
    def of_profile(cls, column: Mapping[str, Any], ids: int) -> KeyDistribution:
        """The `ids` most frequent keys of a column of `lexshard profile`; those that it has not seen are as frequent as
        its rarest.
        """
        tops = np.array([0, *(one["top"] for one in column["coverage"])], np.float64)
        covered = np.array([0.0, *(one["value"] for one in column["coverage"])])
        if ids > tops[-1]:
            rarest = (covered[-1] - covered[-2]) / (tops[-1] - tops[-2])
            tops, covered = np.append(tops, ids), np.append(covered, covered[-1] + rarest * (ids - tops[-1]))
        ends = np.append(tops[(tops > 0) & (tops < ids)], ids)
        return cls._of(ends, np.interp(ends, tops, covered), "profile")

    @classmethod
    def of_counts(cls, counts: npt.NDArray[np.int64]) -> KeyDistribution:
        """counts: int64 [ids], descending: a run's own."""
        ends = _ranks(len(counts))
        return cls._of(ends, np.cumsum(counts, dtype=np.float64)[ends.astype(np.int64) - 1], "prepared run")

    @classmethod
    def _of(cls, ends: Float64s, mass: Float64s, source: str) -> KeyDistribution:
        shares = np.diff(mass, prepend=0.0)
        total = float(shares.sum())
        return cls(np.diff(ends, prepend=0.0), shares / total if total > 0.0 else shares, source)

    def power(self, exponent: float) -> KeyDistribution:
        """Frequencies ** exponent: how negatives are drawn."""
        weights = self.sizes * np.where(self.shares > 0.0, self.shares / self.sizes, np.inf) ** exponent
        weights = np.where(self.shares > 0.0, weights, 0.0)
        return KeyDistribution(self.sizes, weights / weights.sum(), self.source)

    def coverage(self, top: float) -> float:
        """Share of the lookups that ask for the `top` most frequent ids."""
        return float(np.interp(top, np.append(0.0, np.cumsum(self.sizes)), np.append(0.0, np.cumsum(self.shares))))

    def distinct(self, draws: float, first: float = 0.0) -> float:
        """Expected number of distinct ids among `draws` of which rank `first` or more: sum of 1 - (1 - p) ** draws."""
        ends = np.cumsum(self.sizes)
        sizes = np.minimum(self.sizes, np.maximum(0.0, ends - first))
        each = np.minimum(self.shares / self.sizes, 1.0 - 1e-12)
        return float((sizes * -np.expm1(draws * np.log1p(-each))).sum())


def rows_of_step(map: RowMap, distribution: KeyDistribution, draws: float) -> float:
    """Expected number of distinct rows that `draws` lookups ask of a table behind `map`."""
    asked = distribution.distinct(draws)
    if map.is_exact:
        return asked
    if map.is_dynamic:
        return min(asked, float(map.rows))
    if map.kind == "quotient_remainder":
        return sum(_occupied(rows, asked) for rows in (map.remainders, map.rows - map.remainders))
    shared = distribution.distinct(draws, first=map.head) if map.head else asked
    return asked - shared + _occupied(map.rows - map.head, map.hashes * shared)


def _occupied(rows: float, draws: float) -> float:
    """Expected number of `rows` equally likely rows that at least one of `draws` draws hits."""
    return rows * -math.expm1(draws * math.log1p(-1.0 / rows)) if rows > 1 else min(rows, draws)


def _ranks(ids: int) -> Float64s:
    """1, 2, 3... and from where these are dense ranks in a constant ratio, up to `ids`."""
    steps = int(math.log(ids) / math.log(_STEP)) + 1
    ends = np.unique(np.floor(_STEP ** np.arange(steps + 1)))
    return np.append(ends[ends < ids], float(ids))
