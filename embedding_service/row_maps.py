"""Id -> rows: how the ids of a key map find their vectors in a table that has fewer rows than there are ids.

A key map gives every key an id; a table with a RowMap gives every id the vector

    exact               v(i) = T[i]
    hashed              v(i) = (T[h_1(i)] + ... + T[h_k(i)]) / sqrt(k)                k = 1: Weinberger et al. 2009
    head_tail           v(i) = T[i] for i < head; the others are hashed into the rows behind these
    quotient_remainder  v(i) = (T[i mod m] + T[m + i div m]) / sqrt(2), or            Shi et al. 2020
                        v(i) = T[i mod m] * (1 + T[m + i div m])
    dynamic             v(i) = T[s(i)], s learned while training: see `dynamic_rows`

    learned weights     v(i) = sum_j (1 + w_j(i)) T[h_j(i)] / sqrt(k)                 Svenstrup et al. 2017

Ids are ordered by frequency, so the head are the most frequent keys. Division by sqrt(k) leaves a vector its variance
at the start and its step under a gradient, whatever k is: the learning rate of an exact table fits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from embedding_service.ragged import Ragged
from embedding_service.tables import TableSpec

MapKind = Literal["exact", "hashed", "head_tail", "quotient_remainder", "dynamic"]
Eviction = Literal["lfu", "lru", "distance_lfu"]

MAX_HASHES = 8
_WEIGHT_SEED = 1 << 32  # apart from the seeds 1..k of the rows


@dataclass(frozen=True)
class RowMap:
    """How ids 0..ids - 1 find rows in a table of `rows` rows.

    head: of head_tail, how many ids have a row of their own. hashes: k. remainders: m of quotient_remainder. product:
    its vectors are products. weight_rows: rows of the table of learned weights, 0 for none; where ids are more than
    that they share weights, too. eviction, admission: of dynamic, see `DynamicRows`.
    """

    kind: MapKind
    ids: int
    rows: int
    head: int = 0
    hashes: int = 1
    remainders: int = 0
    product: bool = False
    weight_rows: int = 0
    eviction: Eviction = "lfu"
    admission: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that do not fit each other."""
        if self.kind not in get_args(MapKind) or self.eviction not in get_args(Eviction):
            raise ValueError(f"a row map of kind {self.kind!r} and eviction {self.eviction!r} is not known")
        if self.remainders < 0 or self.weight_rows < 0 or self.admission < 1:
            raise ValueError(f"not a row map: {self}")
        if self.weight_rows and self.kind not in ("hashed", "head_tail"):
            raise ValueError(f"a map of kind {self.kind} has no learned weights: {self}")
        if not (self.ids >= 1 and self.rows >= 1 and 1 <= self.hashes <= MAX_HASHES and 0 <= self.head < self.rows):
            raise ValueError(f"not a row map: {self}")
        if self.kind == "exact" and self.rows != self.ids:
            raise ValueError(f"an exact map of {self.ids} ids has as many rows; got {self.rows}")
        if self.kind == "quotient_remainder":
            quotients = -(-self.ids // self.remainders) if self.remainders > 0 else self.rows
            if self.remainders + quotients != self.rows:
                raise ValueError(f"{self.remainders} remainders and their quotients are not {self.rows} rows")

    @classmethod
    def exact(cls, ids: int) -> RowMap:
        """Every id has its row."""
        return cls("exact", ids, ids)

    @classmethod
    def quotient_remainder(cls, ids: int, rows: int, *, product: bool = False) -> RowMap:
        """The map with the most remainders that fits in `rows` rows. Raises ValueError if there is none."""
        remainders = rows - 1
        while remainders > 1 and remainders + -(-ids // remainders) > rows:
            remainders = rows - -(-ids // remainders)
        if remainders < 1 or remainders + -(-ids // remainders) > rows:
            fewest = 2 * math.isqrt(ids) + 2
            raise ValueError(f"{ids} ids have no quotients and remainders in {rows} rows; {fewest} suffice")
        return cls(
            "quotient_remainder", ids, remainders + -(-ids // remainders), remainders=remainders, product=product
        )

    @property
    def is_exact(self) -> bool:
        return self.kind == "exact"

    @property
    def weight_width(self) -> int:
        """Numbers in a row of the table of learned weights: k, and what FBGEMM's step of 4 adds."""
        return -(-self.hashes // 4) * 4

    def lists(self, ids: npt.NDArray[np.int64]) -> Ragged:
        """The rows of `ids` (int64 [n], each in 0..ids - 1): n lists of int64 rows."""
        if self.kind == "exact":
            return Ragged(ids, np.arange(len(ids) + 1, dtype=np.int64))
        if self.kind == "quotient_remainder":
            quotient, remainder = np.divmod(ids, self.remainders)
            rows = np.stack([remainder, self.remainders + quotient], axis=1).reshape(-1)
            return Ragged(rows, np.arange(len(ids) + 1, dtype=np.int64) * 2)
        assert self.kind != "dynamic", "which rows these ids have is not a function of the ids"
        from embedding_service import hash_kernels as kernels

        ids = np.ascontiguousarray(ids)
        offsets = np.arange(len(ids) + 1, dtype=np.int64) * self.hashes
        if self.head:
            offsets = np.zeros(len(ids) + 1, np.int64)
            np.cumsum(np.where(ids < self.head, 1, self.hashes), out=offsets[1:])
        rows = np.empty(offsets[-1], np.int64)
        kernels.hash_rows(ids, self.head, self.rows - self.head, self.hashes, rows)
        return Ragged(rows, offsets)

    def weight_ids(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the learned weights of `ids` (int64 [n]) are: int64 [n], -1 for ids with a row of their own."""
        shared = np.where(ids < self.head, -1, ids - self.head)
        if self.ids - self.head <= self.weight_rows:
            return shared
        from embedding_service import hash_kernels as kernels

        places = np.empty(len(ids), np.int64)
        kernels.hash_places(np.ascontiguousarray(ids), _WEIGHT_SEED, self.weight_rows, places)
        return np.where(shared < 0, -1, places)

    def tables(self, spec: TableSpec) -> list[TableSpec]:
        """The tables that hold what `spec`, a table with a row for every id, stands for."""
        found = [dataclasses.replace(spec, rows=self.rows)]
        if self.weight_rows:
            name = weight_table(spec.name)
            weights = dataclasses.replace(spec, name=name, rows=self.weight_rows, dim=self.weight_width, init_scale=0.0)
            found.append(weights)
        return found

    @property
    def is_dynamic(self) -> bool:
        return self.kind == "dynamic"

    def to_dict(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        if not self.is_dynamic:  # as artifacts have it, none of whose maps is dynamic
            del found["eviction"], found["admission"]
        return found

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> RowMap:
        """Raises TypeError or ValueError for a mapping that no `to_dict` has written."""
        kinds: dict[Any, type] = {"int": int, "bool": bool}
        for field in dataclasses.fields(cls):
            if field.name in value and type(value[field.name]) is not kinds.get(field.type, str):
                raise TypeError(f"{field.name} of a row map is {value[field.name]!r}")
        return cls(**value)


def weight_table(name: str) -> str:
    """The table of the learned weights of table `name`; no feature's table can have this name."""
    return f"weights_{name}"


def physical_tables(specs: Sequence[TableSpec], maps: Mapping[str, RowMap]) -> list[TableSpec]:
    """What has to be held in memory for tables `specs` with a row for every id, those in `maps` through their map.

    A pure function of sizes, which a planner can call without data.
    """
    return [table for spec in specs for table in (maps[spec.name].tables(spec) if spec.name in maps else [spec])]


@dataclass(frozen=True)
class Composition:
    """How the vectors of n ids are made of u looked-up rows.

    index: int64 [m], the rows of every id one after the other; offsets: int64 [n + 1]; scale: float32 [m].
    weight_index: int64 [n] into the looked-up weights, the last of which is none; None without learned weights.
    """

    map: RowMap
    index: Tensor
    offsets: Tensor
    scale: Tensor
    weight_index: Tensor | None

    def vectors(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """float32 [n, dim]. rows: float32 [u, dim]; weights: float32 [w, weight_width]."""
        device = rows.device
        num = len(self.offsets) - 1
        if not num:
            none = rows.new_zeros(0, rows.shape[1]) + 0.0 * rows.sum()  # other ranks wait for both tables' gradients
            return none if weights is None else none + 0.0 * weights.sum()
        index = self.index.to(device)
        if self.map.product:
            remainder, quotient = rows.index_select(0, index[0::2]), rows.index_select(0, index[1::2])
            return remainder * (1.0 + quotient)
        scale = self.scale.to(device)
        if self.weight_index is not None:
            assert weights is not None
            scale = scale * self._factors(weights)
        return F.embedding_bag(index, rows, self.offsets[:-1].to(device), mode="sum", per_sample_weights=scale)

    def _factors(self, weights: Tensor) -> Tensor:
        """1 + w of every entry of `index`; 1 where an id has its own row: float32 [m]."""
        assert self.weight_index is not None
        device = weights.device
        learned = torch.cat([weights, weights.new_zeros(1, weights.shape[1])])  # the last one: no weights
        lengths = self.offsets.diff()
        owner = torch.repeat_interleave(lengths)
        nth = torch.arange(len(self.index)) - self.offsets[:-1][owner]
        place = self.weight_index[owner] * weights.shape[1] + nth
        return 1.0 + learned.reshape(-1).index_select(0, place.to(device))


def scale_of(map: RowMap, lists: Ragged) -> npt.NDArray[np.float32]:
    """1 / sqrt(how many rows its id has), for every entry of `lists`: float32 [m]."""
    if not map.head:
        return np.full(len(lists.values), (2.0 if map.remainders else map.hashes) ** -0.5, np.float32)
    lengths = lists.lengths
    scale: npt.NDArray[np.float32] = np.repeat(lengths.astype(np.float64) ** -0.5, lengths).astype(np.float32)
    return scale
