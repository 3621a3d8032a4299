"""Sharded tables asked by id: behind every table stands its row map, and rows that ids share learn from all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedding_service.row_maps import Composition, RowMap, physical_tables, scale_of, weight_table
from embedding_service.sharding import Asked, MakeTables, ShardedTables
from embedding_service.tables import Optimizer, TableSpec, deduplicate


@dataclass(frozen=True)
class MappedAsked:
    """What a lookup asks for: distinct rows, or what `ShardedTables.route` made of them, and how ids come of them."""

    rows: Asked
    compositions: dict[str, Composition]


class MappedTables:
    """`ShardedTables` with the same calls, in which ids stand for rows.

    A table without an entry in `maps`, or with an exact one, passes through as it is.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        maps: Mapping[str, RowMap] | None = None,
        *,
        optimizer: Optimizer,
        learning_rate: float,
        seed: int,
        device: torch.device | None = None,
        make_tables: MakeTables = ShardedTables,
    ) -> None:
        """specs: a row for every id; maps: table -> how its ids share rows; make_tables: what makes the tables in
        memory, `ShardedTables` or what is like it to who only looks rows up. Raises ValueError if specs and maps
        disagree.
        """
        self.maps = {name: one for name, one in (maps or {}).items() if not one.is_exact}
        self.ids = {spec.name: spec.rows for spec in specs}
        for name, one in self.maps.items():
            if self.ids.get(name) != one.ids:
                raise ValueError(f"the row map of table {name} is for {one.ids} ids; got {self.ids.get(name)}")
        self.physical = make_tables(
            physical_tables(specs, self.maps),
            optimizer=optimizer,
            learning_rate=learning_rate,
            seed=seed,
            device=device,
        )
        self.specs = self.physical.specs  # of the tables in memory, those of learned weights included
        self.optimizer: Optimizer = optimizer

    def route(self, ids: Mapping[str, Tensor]) -> MappedAsked:
        """As `ShardedTables.route`: what can be done ahead of a lookup of `ids`; a collective call."""
        asked = self._expand(ids)
        return MappedAsked(self.physical.route(asked.rows), asked.compositions)  # type: ignore[arg-type]

    def lookup(self, asked: Mapping[str, Tensor] | MappedAsked) -> dict[str, Tensor]:
        """Vectors of ids, as `ShardedTables.lookup` gives rows: table -> float32 [n, dim]; a collective call.

        asked: table -> int64 [n], distinct ids, or what `route` made of them. `backward` updates all rows of an id.
        """
        found = asked if isinstance(asked, MappedAsked) else self._expand(asked)
        rows = self.physical.lookup(found.rows)
        for name, composition in found.compositions.items():
            rows[name] = composition.vectors(rows[name], rows.pop(weight_table(name), None))
        return rows

    def _expand(self, ids: Mapping[str, Tensor]) -> MappedAsked:
        rows = {name: asked for name, asked in ids.items() if name not in self.maps}
        compositions = {}
        for name, map in self.maps.items():
            asked = ids[name].numpy() if name in ids else np.empty(0, np.int64)
            if len(asked) and not 0 <= asked.min() <= asked.max() < map.ids:
                raise IndexError(f"table {name} has ids 0..{map.ids - 1}; got {asked.min()}..{asked.max()}")
            lists = map.lists(asked)
            distinct, places = deduplicate({"": lists.values})
            rows[name] = torch.from_numpy(distinct)
            weight_index = None
            if map.weight_rows:
                wanted = map.weight_ids(asked)
                known = wanted >= 0
                distinct, found = deduplicate({"": wanted[known]})
                rows[weight_table(name)] = torch.from_numpy(distinct)
                index = np.full(len(asked), len(distinct), np.int64)
                index[known] = found[""]
                weight_index = torch.from_numpy(index)
            compositions[name] = Composition(
                map,
                torch.from_numpy(np.ascontiguousarray(places[""])),
                torch.from_numpy(lists.offsets),
                torch.from_numpy(scale_of(map, lists)),
                weight_index,
            )
        return MappedAsked(rows, compositions)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Takes effect in the next `backward`."""
        self.physical.set_learning_rate(learning_rate)

    def local_shards(self, name: str) -> list[tuple[int, Tensor]]:
        """This rank's part of a table in memory: see `ShardedTables.local_shards`."""
        return self.physical.local_shards(name)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser state as sharded tensors, for the distributed checkpoint."""
        return self.physical.state_dict()
