"""Sharded tables asked by id: behind every table stands its row map, and rows that ids share learn from all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding_service.dynamic_rows import DynamicRows, Slots
from embedding_service.row_maps import Composition, RowMap, physical_tables, scale_of, weight_table
from embedding_service.sharding import Asked, MakeTables, ShardedTables
from embedding_service.tables import Optimizer, TableSpec, deduplicate
from embedding_service.towers import Given, row_values, with_rows


@dataclass(frozen=True)
class _Places:
    """Where among the looked-up rows the one of each id is: int64 [n]."""

    index: Tensor

    def vectors(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return rows.index_select(0, self.index.to(rows.device))


@dataclass(frozen=True)
class MappedAsked:
    """What a lookup asks for: distinct rows, or what `ShardedTables.route` made of them, and how ids come of them.

    slots: dynamic tables in which ids got or lost rows since the last lookup that was prepared.
    """

    rows: Asked
    compositions: dict[str, Composition | _Places]
    slots: dict[str, Slots] = field(default_factory=dict)


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
        self.dynamic = {
            name: DynamicRows(one.rows, eviction=one.eviction, admission=one.admission)
            for name, one in self.maps.items()
            if one.is_dynamic
        }
        self._evicted: dict[str, list[npt.NDArray[np.int64]]] = {}
        self.physical = make_tables(
            physical_tables(specs, self.maps),
            optimizer=optimizer,
            learning_rate=learning_rate,
            seed=seed,
            device=device,
        )
        self.specs = self.physical.specs  # of the tables in memory, those of learned weights included
        self.optimizer: Optimizer = optimizer

    def learn(self, ids: Mapping[str, npt.NDArray[np.int64]], place: tuple[int, int]) -> None:
        """Let dynamic tables see the ids of the window at `place` (epoch, window), those of all ranks.

        ids: table -> int64 [n], as often as they occur. To be called where `route` is, before the window's first step;
        what it changes takes place with the first lookup that is prepared after it.
        """
        for name, rows in self.dynamic.items():
            rows.learn(ids[name], place)

    def known(self, name: str, values: Given) -> Given:
        """`values`, ids of table `name`, with -1 for those that have no row of their own in a dynamic table."""
        if name not in self.dynamic:
            return values
        trained, ids = self.dynamic[name].trained, row_values(values)
        return with_rows(values, np.where(trained.find(ids) < trained.rows - 1, ids, -1))

    def occupancy(self) -> dict[str, dict[str, int]]:
        """Dynamic table -> {"occupied": rows that an id has, "admitted", "evicted": ids so far}."""
        found = {}
        for name, rows in self.dynamic.items():
            now = rows.trained
            found[name] = {"occupied": len(now.ids), "admitted": now.num_admitted, "evicted": now.num_evicted}
        return found

    def evicted(self) -> dict[str, npt.NDArray[np.int64]]:
        """Table -> ids that have lost their row since the last call: int64 [n], ascending at each time."""
        evicted, self._evicted = self._evicted, {}
        return {name: np.concatenate(parts) for name, parts in evicted.items()}

    def route(self, ids: Mapping[str, Tensor]) -> MappedAsked:
        """As `ShardedTables.route`: what can be done ahead of a lookup of `ids`; a collective call."""
        asked = self._expand(ids, ahead=True)
        slots = {name: news for name, rows in self.dynamic.items() if (news := rows.news()) is not None}
        return MappedAsked(self.physical.route(asked.rows), asked.compositions, slots)  # type: ignore[arg-type]

    def lookup(self, asked: Mapping[str, Tensor] | MappedAsked) -> dict[str, Tensor]:
        """Vectors of ids, as `ShardedTables.lookup` gives rows: table -> float32 [n, dim]; a collective call.

        asked: table -> int64 [n], distinct ids, or what `route` made of them. `backward` updates all rows of an id.
        """
        found = asked if isinstance(asked, MappedAsked) else self._expand(asked, ahead=False)
        for name, slots in found.slots.items():
            gone, handed_on = self.dynamic[name].adopt(slots)
            self.physical.reset(name, handed_on)
            if len(gone):
                self._evicted.setdefault(name, []).append(gone)
        rows = self.physical.lookup(found.rows)
        for name, composition in found.compositions.items():
            rows[name] = composition.vectors(rows[name], rows.pop(weight_table(name), None))
        return rows

    def _expand(self, ids: Mapping[str, Tensor], *, ahead: bool) -> MappedAsked:
        """ahead: for a step whose window dynamic tables have learned, though its lookup is still to come."""
        rows = {name: asked for name, asked in ids.items() if name not in self.maps}
        compositions: dict[str, Composition | _Places] = {}
        for name, map in self.maps.items():
            asked = ids[name].numpy() if name in ids else np.empty(0, np.int64)
            if len(asked) and not 0 <= asked.min() <= asked.max() < map.ids:
                raise IndexError(f"table {name} has ids 0..{map.ids - 1}; got {asked.min()}..{asked.max()}")
            if map.is_dynamic:
                dynamic = self.dynamic[name]
                distinct, places = deduplicate({"": (dynamic.find_ahead if ahead else dynamic.trained.find)(asked)})
                rows[name] = torch.from_numpy(distinct)
                compositions[name] = _Places(torch.from_numpy(np.ascontiguousarray(places[""])))
                continue
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
        """Weights and optimiser state as sharded tensors, and which ids have rows, for the distributed checkpoint."""
        return self.physical.state_dict() | self.slots()

    def slots(self) -> dict[str, Tensor]:
        """The part of `state_dict` that says which ids have rows of dynamic tables: the tensors, not copies."""
        return {
            f"slots.{name}.{part.lstrip('_')}": value
            for name, rows in self.dynamic.items()
            for part, value in rows.trained.to_dict().items()
        }
