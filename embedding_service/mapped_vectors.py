"""Stored vectors of ids that share rows: what `MappedTables` is in training, over an artifact's files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from embedding_service import rank_kernels as kernels
from embedding_service.exact import Float32
from embedding_service.row_maps import RowMap, scale_of
from embedding_service.vectors import VectorSet


class MappedVectors:
    """The vectors of ids 0..rows - 1, composed of the stored rows when they are taken; see `row_maps`."""

    def __init__(self, map: RowMap, stored: VectorSet, weights: VectorSet | None = None) -> None:
        """stored: map.rows rows; weights: the learned ones, map.weight_rows rows, if there are any."""
        self.map, self.rows, self.dim = map, map.ids, stored.dim
        self._stored, self._weights = stored, weights

    def take(self, rows: npt.NDArray[np.integer]) -> Float32:
        """float32 [*rows.shape, dim] of ids, which lie in 0..self.rows - 1."""
        return self._take(np.asarray(rows, np.int64).reshape(-1)).reshape(*rows.shape, self.dim)

    def _take(self, ids: npt.NDArray[np.int64]) -> Float32:
        lists = self.map.lists(ids)
        rows = self._stored.take(lists.values)
        if self.map.product:
            product: Float32 = rows[0::2] * (np.float32(1.0) + rows[1::2])
            return product
        scale = scale_of(self.map, lists)
        if self._weights is not None:
            scale = np.multiply(scale, self._factors(ids, lists.offsets))
        out = np.empty((len(ids), self.dim), np.float32)
        kernels.pool(rows, lists.offsets, scale, out)
        return out

    def _factors(self, ids: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> Float32:
        """1 + w of every row of `ids`: float32 [m]."""
        assert self._weights is not None
        wanted = self.map.weight_ids(ids)
        lengths = np.diff(offsets)
        factors = np.ones((len(ids), int(lengths.max(initial=0))), np.float32)
        known = wanted >= 0
        factors[known] += self._weights.take(wanted[known])[:, : factors.shape[1]]
        owner = np.repeat(np.arange(len(ids)), lengths)
        nth = np.arange(offsets[-1]) - offsets[:-1][owner]
        found: Float32 = factors[owner, nth]
        return found

    def chunks(self, size: int = 65_536) -> Iterator[tuple[int, Float32]]:
        """(first id, float32 [at most size, dim]) pairs that cover all ids in order."""
        for start in range(0, self.rows, size):
            yield start, self._take(np.arange(start, min(self.rows, start + size)))
